"""Labels that a readout head gives: what it reads of a picture under little noise."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.records import Label, Skip, SourceSample
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.samples import DataError
from rg.heads import load_head
from rg.heads.spatial import SpatialHead
from rg.io.images import from_bytes
from rg.points import KEYPOINTS, draw_skeletons, peaks


def spatial_head(path: str, own_class: str | None = None) -> SpatialHead:
    """A head whose readings can be drawn.

    Raises:
        ValueError: it compares with a reference instead of reading a map; see rg.heads.load_head.
    """
    head = load_head(path, own_class)
    if not isinstance(head, SpatialHead):
        raise ValueError(
            f"head.path={path}: expected a head that reads a map (pose, depth, edges), found a {type(head).__name__}"
        )
    return head


class ReadoutLabels:
    """Labels by a head: skeletons with their keypoints where it reads heatmaps, else its map.

    A keypoint is taken where its heatmap rises to `least`. A picture of fewer than `min_keypoints` of them, or whose
    map hardly changes (a standard deviation below `min_contrast` of the span from black to white), is left out: the
    head is unsure of it.

    Args:
        head: folder of the head, or its name.
        weights: fingerprint of the head, kept with the labels; another head of the same name is then noticed.
        line_width: thickness of a limb in pixels of the image.
        timestep: noise under which the picture is read.
    """

    def __init__(
        self,
        *,
        head: str,
        weights: str | None = None,
        line_width: float = 2.0,
        timestep: int = 50,
        least: float = 0.3,
        min_keypoints: int = 8,
        min_contrast: float = 0.02,
    ) -> None:
        self.head, self.line_width, self.timestep = spatial_head(head), line_width, timestep
        self.least, self.min_keypoints, self.min_contrast = least, min_keypoints, min_contrast

    def attach_backbone(self, backbone: DiffusionBackbone) -> None:
        """Sets the model whose features are read; raises ValueError when the head was made for another family."""
        self.head.attach_backbone(backbone).to(backbone.device)
        if self.timestep >= backbone.num_timesteps:
            raise DataError(f"timestep: expected less than {backbone.num_timesteps}, got {self.timestep}")

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        latents, _ = self.head.backbone.encode(from_bytes(torch.stack([sample.image for sample in samples])))
        noise = torch.stack([_noise(sample, latents.shape[1:]) for sample in samples]).to(latents)
        times = torch.full((len(samples),), self.timestep, device=latents.device)
        with torch.no_grad():
            readout = self.head.readout(latents, noise, times).cpu()
        if self.head.hparams.variant == "keypoints":
            return self._poses(samples, readout)
        size = samples[0].image.shape[1:]
        maps = F.interpolate(self.head.preview(readout), size, mode="bilinear", align_corners=False)
        return [self._map(sample, image) for sample, image in zip(samples, maps, strict=True)]

    def _poses(self, samples: Sequence[SourceSample], readout: Tensor) -> list[Label | Skip]:
        size = tuple(samples[0].image.shape[1:])
        points, heights = peaks(readout, size)
        sure = (heights >= self.least).to(points)
        poses = torch.cat([points * sure[..., None], sure[..., None]], -1)[:, None]
        drawings = (draw_skeletons(poses, size, size, self.line_width) * 255).round().byte()
        found = sure.sum(1).int().tolist()
        return [
            Label(drawings[row], poses[row])
            if found[row] >= self.min_keypoints
            else Skip(f"{sample.name}: the head is sure of {found[row]} keypoints, {self.min_keypoints} are asked for")
            for row, sample in enumerate(samples)
        ]

    def _map(self, sample: SourceSample, image: Tensor) -> Label | Skip:
        contrast = image.std().item()
        if contrast < self.min_contrast:
            return Skip(f"{sample.name}: the head reads nothing, its map changes by {contrast:.3f}")
        return Label((image * 255).round().byte(), torch.zeros(0, len(KEYPOINTS), 3))


def _noise(sample: SourceSample, shape: torch.Size) -> Tensor:
    # The hash of a tuple of integers is the same in every process.
    generator = torch.Generator().manual_seed(hash(sample.seed or ()) % 2**63)
    return torch.randn(shape, generator=generator)
