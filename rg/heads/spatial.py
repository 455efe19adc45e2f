"""Spatially aligned readouts: pose, depth, edges (Luo et al., 2024, section 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.heads.base import ReadoutHead
from rg.metrics.keypoints import PCK
from rg.metrics.maps import DepthScores, EdgeScores
from rg.metrics.statistics import MeanPerImage
from rg.points import COLORS, KEYPOINTS, Size, draw_skeletons, heatmaps, peaks

VARIANTS = ("rgb", "keypoints")
# A heatmap cell below this height counts as background.
FOREGROUND = 0.05
# Readouts lie in about [0, 1]: a clear bump then holds nearly all of the softmax over a map's cells.
SHARPNESS = 10.0


class SpatialHead(ReadoutHead):
    """Reads one map that lies on the image: an RGB control image, or one heatmap per keypoint.

    The readout is (B, 3, H, W) in control_range (variant "rgb") or (B, 18, H, W), about [0, 1] (variant "keypoints").

    Args:
        variant: "rgb" (the paper's) or "keypoints".
        control_range: black and white in the "rgb" readout; (-0.5, 0.5) for pose and edges, (-1, 1) for depth.
        sparse: balance background and foreground in the loss (pose, edges), or take a plain mean (depth).
        sparse_energy: the same for the guidance energy; the authors guide with a plain mean.
        sigma: radius of a heatmap's bump, in readout cells.
        contrast: weight of `misplacement` in the guidance energy of variant "keypoints". The squared error is flat
            where a keypoint is read in another place, such as left for right; this is steepest there.
        hidden_channels: width of the first of three output convolutions.
        scores: what validation measures: "pose", "depth" or "edges", see rg.heads.spatial.
        hyperparameters: see ReadoutHead.
    """

    def __init__(
        self,
        *,
        variant: str = "rgb",
        control_range: tuple[float, float] = (-0.5, 0.5),
        sparse: bool = True,
        sparse_energy: bool = True,
        sigma: float = 1.0,
        contrast: float = 0.0,
        hidden_channels: int = 128,
        scores: str = "pose",
        **hyperparameters: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
        known = list(SCORES) if variant == "rgb" else ["pose"]
        if scores not in known:
            raise ValueError(f"scores: expected one of {known} with variant={variant}, got {scores!r}")
        super().__init__(**hyperparameters)
        self.output_head = nn.Sequential(
            nn.Conv2d(self.hparams.projection_dim, hidden_channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden_channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 3 if variant == "rgb" else len(KEYPOINTS), 1),
        )
        self.val_scores = nn.ModuleDict({str(t): SCORES[scores].metric() for t in self.hparams.val_timesteps})

    def forward(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """Readout of taps (B, C_l, h_l, w_l), coarse to fine, and time embedding (B, E)."""
        readout = self.output_head(self.aggregation(features, time_embedding))
        return readout.tanh() if self.hparams.variant == "rgb" else readout

    def encode_target(self, control: Tensor, *, readout_size: Size, image_size: Size) -> Tensor:
        """What the readout should be.

        Args:
            control: images (B, 3, H, W) in [-1, 1] of the image's size, or keypoints (B, P, 18, 3) of (x, y, visible)
                in the image's pixels, which the "rgb" variant draws as skeletons.
            readout_size, image_size: (height, width).

        Raises:
            ValueError: the control has another shape or size, or the variant cannot be made from it.
        """
        if control.ndim != 4:
            raise ValueError(f"control: expected (B,3,H,W) images or (B,P,18,3) keypoints, got {tuple(control.shape)}")
        is_keypoints = control.shape[-2:] == (len(KEYPOINTS), 3)
        if self.hparams.variant == "keypoints":
            if not is_keypoints:
                raise ValueError(
                    f"control: a head of variant=keypoints expects (B,P,18,3) keypoints, got {tuple(control.shape)}"
                )
            return heatmaps(control, image_size, readout_size, self.hparams.sigma)
        if is_keypoints:
            # One readout cell wide, so that a limb survives the area resize.
            stroke = image_size[1] / readout_size[1]
            image = draw_skeletons(control, image_size, image_size, stroke)
        elif control.shape[1:] != (3, *image_size):
            raise ValueError(
                f"control: expected images (B,3,{image_size[0]},{image_size[1]}), got {tuple(control.shape)}"
            )
        else:
            image = (control + 1) / 2
        low, high = self.hparams.control_range
        return F.interpolate(image, readout_size, mode="area") * (high - low) + low

    def control(self, batch: dict[str, Any]) -> Tensor:
        """What a batch says that the readout should be, as `encode_target` takes it: its keypoints, or its labels."""
        return batch["keypoints"] if self.hparams.variant == "keypoints" else batch["label"]

    def error(self, readout: Tensor, target: Tensor, *, sparse: bool) -> Tensor:
        """Squared error per sample (B,); sparse: background and foreground elements weigh the same."""
        squared = (readout - target) ** 2
        if not sparse:
            return squared.flatten(1).mean(1)
        background = self.hparams.control_range[0] if self.hparams.variant == "rgb" else FOREGROUND
        return balanced_mean(squared, target > background)

    def loss(self, readout: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean error over the batch."""
        sizes = {"readout_size": tuple(readout.shape[-2:]), "image_size": tuple(batch["label"].shape[-2:])}
        target = self.encode_target(self.control(batch), **sizes)
        return self.error(readout, target, sparse=self.hparams.sparse).mean()

    def energy(self, readout: Tensor, target: Tensor) -> Tensor:
        """Distance of readouts to encoded targets, per sample (B,): what guidance lowers."""
        energy = self.error(readout, target, sparse=self.hparams.sparse_energy)
        if self.hparams.variant == "keypoints" and self.hparams.contrast:
            energy = energy + self.hparams.contrast * misplacement(readout, target)
        return energy

    @property
    def readout_span(self) -> float:
        """Width of the control range; 1 for heatmaps."""
        low, high = self.hparams.control_range
        return high - low if self.hparams.variant == "rgb" else 1.0

    def keypoints(self, readout: Tensor, image_size: Size) -> Tensor:
        """The pose in a readout: (B, 18, 2) in pixels of an image of image_size."""
        if self.hparams.variant == "keypoints":
            return peaks(readout, image_size)[0]
        low, high = self.hparams.control_range
        colors = readout.new_tensor(COLORS) / 255 * (high - low) + low
        distance = ((readout[:, None] - colors[..., None, None]) ** 2).sum(2)
        return peaks(F.avg_pool2d(torch.exp(-8 * distance), 3, 1, 1), image_size)[0]

    def metrics(self, readout: Tensor, batch: dict[str, Any], timestep: int) -> None:
        """Logs what `scores` names, of held-out images; PCK over those of one person."""
        found = SCORES[self.hparams.scores].read(self, readout, batch)
        if found is not None:
            self.val_scores[str(timestep)].update(*found)

    def on_validation_epoch_end(self) -> None:
        prefix = SCORES[self.hparams.scores].prefix
        for timestep, metric in self.val_scores.items():
            if metric.update_called:
                for name, value in metric.compute().items():
                    self.log(f"val/{prefix}{name}_t{timestep}", value["mean"], rank_zero_only=True)
            metric.reset()

    def preview(self, readout: Tensor) -> Tensor:
        """Images of readouts or encoded targets: (B, 3, H, W) in [0, 1]."""
        if self.hparams.variant == "rgb":
            low, high = self.hparams.control_range
            return ((readout - low) / (high - low)).clamp(0, 1)
        colors = readout.new_tensor(COLORS) / 255
        return (readout.clamp(0, 1)[:, :, None] * colors[..., None, None]).amax(1)


def misplacement(readout: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of where keypoints are read and where they should be, mean over those drawn, per sample: (B,).

    Args:
        readout: (B, K, H, W) heatmaps; softmax over the cells of SHARPNESS times a map: where its keypoint is read.
        target: (B, K, H, W) or (1, K, H, W) heatmaps with one bump of height about 1, or nothing drawn.
    """
    wanted = target.flatten(2)
    drawn = (wanted.amax(-1) > 0.5).to(readout)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp_min(1e-6)
    entropy = -(wanted * (SHARPNESS * readout.flatten(2)).log_softmax(-1)).sum(-1)
    return (entropy * drawn).sum(1) / drawn.sum(1).clamp_min(1)


def balanced_mean(values: Tensor, foreground: Tensor) -> Tensor:
    """Mean over background plus mean over foreground elements, halved, per sample: (B, ...) -> (B,).

    A sample that lacks one of the two is averaged over the other.
    """
    values, foreground = values.flatten(1), foreground.flatten(1)
    halves = []
    for part in (foreground, ~foreground):
        count = part.sum(1)
        halves.append(((values * part).sum(1) / count.clamp_min(1), (count > 0).to(values)))
    (inner, has_inner), (outer, has_outer) = halves
    return (inner + outer) / (has_inner + has_outer)


@dataclass(frozen=True)
class Score:
    """metric: makes the metric of one noise level. prefix: of its names in the log. read: what its `update` takes, of a
    head, a readout and its batch; None where the batch has nothing to score."""

    metric: Callable[[], MeanPerImage]
    prefix: str
    read: Callable[[SpatialHead, Tensor, dict[str, Any]], tuple[Tensor, ...] | None]


def read_poses(head: SpatialHead, readout: Tensor, batch: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Points read and true (N, 18, 2) and which are visible (N, 18), of the images of one person."""
    people = (batch["keypoints"][..., 2] > 0).any(-1)
    single = people.sum(1) == 1
    if not single.any():
        return None
    truth = batch["keypoints"][single][people[single]]
    found = head.keypoints(readout[single], tuple(batch["label"].shape[-2:]))
    return found, truth[..., :2], truth[..., 2] > 0


def read_maps(head: SpatialHead, readout: Tensor, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """Readout and label as grey images of the label's size: (B, H, W) in [0, 1]."""
    label = batch["label"]
    read = F.interpolate(head.preview(readout), label.shape[-2:], mode="bilinear", align_corners=False)
    return read.mean(1), (label.mean(1) + 1) / 2


SCORES = {
    "pose": Score(partial(PCK, alphas=(0.05, 0.1)), "pck@", read_poses),
    "depth": Score(DepthScores, "", read_maps),
    "edges": Score(EdgeScores, "", read_maps),
}
