"""A network that judges pictures of one person, 18 keypoints and their confidence, and knows nothing of heads."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rg.models import locate
from rg.points import KEYPOINTS, peaks

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# The keypoint that each one becomes when a picture is mirrored: left and right change places.
_SIDES = {"left": "right", "right": "left"}
MIRROR = tuple(KEYPOINTS.index("_".join(_SIDES.get(word, word) for word in name.split("_"))) for name in KEYPOINTS)


class Detection(NamedTuple):
    """What the detector found in B pictures.

    points: (B, 18, 2), (x, y) in pixels of the pictures, keypoints in the order of `rg.points.KEYPOINTS`.
    confidence: (B, 18) in [0, 1], the largest probability mass of any window of 5x5 cells: low when a keypoint lies
        outside the picture and when it could be in several places.
    present: (B,) bool, whether there is a person at all.
    """

    points: Tensor
    confidence: Tensor
    present: Tensor


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016): (B, inputs, h, w) -> (B, outputs, h/stride, w/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.shortcut(x) + self.body(x))


class KeypointDetector(nn.Module):
    """An hourglass (Newell et al., 2016): for each keypoint a distribution over half-resolution cells and "absent".

    Pictures enter as 4x4 patches and the maps leave as 2x2 patches, so that nearly all arithmetic runs at a quarter of
    the resolution: `detect` takes about 5 ms of one core for a 64 px picture.

    Args:
        widths: channels at 1/4, 1/8 and 1/16 of the resolution, multiples of 8.
        threshold: mean confidence over the keypoints from which on a person counts as present, in [0, 1].
    """

    def __init__(self, *, widths: Sequence[int], threshold: float) -> None:
        super().__init__()
        if len(widths) != 3 or any(width <= 0 or width % 8 for width in widths):
            raise ValueError(f"expected three positive multiples of 8, got {list(widths)}: change `widths`")
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {threshold}: change `threshold`")
        self.widths, self.threshold = tuple(widths), threshold
        fine, middle, coarse = widths
        self.stem = nn.Conv2d(3 * 16, fine, 3, padding=1)
        self.fine = ResidualBlock(fine, fine)
        self.middle = ResidualBlock(fine, middle, 2)
        self.coarse = ResidualBlock(middle, coarse, 2)
        self.merge_middle = ResidualBlock(coarse + middle, middle)
        self.merge_fine = ResidualBlock(middle + fine, fine)
        self.maps = nn.Conv2d(fine, 4 * len(KEYPOINTS), 1)
        self.absent = nn.Linear(coarse, len(KEYPOINTS))

    def _pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 16 or images.shape[3] % 16:
            raise ValueError(f"expected images (B, 3, H, W) with H and W multiples of 16, got {tuple(images.shape)}")
        fine = self.fine(F.silu(self.stem(F.pixel_unshuffle(images, 4))))
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores every cell, and absence, for every keypoint; one softmax over a keypoint's scores is its distribution.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of 16.

        Returns:
            Scores of the cells (B, 18, H / 2, W / 2) and of absence (B, 18), any range.

        Raises:
            ValueError: images of another shape.
        """
        fine, middle, coarse = self._pyramid(images)
        merged = self.merge_middle(torch.cat([_double(coarse), middle], 1))
        merged = self.merge_fine(torch.cat([_double(merged), fine], 1))
        return F.pixel_shuffle(self.maps(merged), 2), self.absent(coarse.mean((2, 3)))

    def probabilities(self, images: Tensor) -> Tensor:
        """Where each keypoint is, averaged over the pictures and their mirror images: (B, 18, H / 2, W / 2).

        A map sums to 1 less the probability that its keypoint is not in the picture.
        """
        straight, mirrored = (_softmax(*self(x)) for x in (images, images.flip(-1)))
        return (straight + mirrored[:, list(MIRROR)].flip(-1)) / 2

    @torch.no_grad()
    def detect(self, images: Tensor) -> Detection:
        """Finds the keypoints of the one (or largest) person in images (B, 3, H, W) in [-1, 1]."""
        cells = self.probabilities(images)
        points, _ = peaks(cells, images.shape[-2:])
        confidence = (F.avg_pool2d(cells, 5, stride=1, padding=2) * 25).flatten(2).amax(-1).clamp(0, 1)
        return Detection(points, confidence, confidence.mean(1) >= self.threshold)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features for distances between sets of pictures: images (B, 3, H, W) in [-1, 1] -> (B, widths[2])."""
        return self._pyramid(images)[2].mean((2, 3))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights (half precision) and configuration, each under a temporary name first."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        weights, config = target / f"{WEIGHTS}.partial", target / f"{CONFIG}.partial"
        save_file({name: value.half().contiguous() for name, value in self.state_dict().items()}, weights)
        config.write_text(json.dumps({"widths": list(self.widths), "threshold": self.threshold}, indent=2) + "\n")
        weights.replace(target / WEIGHTS)
        config.replace(target / CONFIG)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Reads a detector written by `save_pretrained`, or a shipped one by its name, in float32, ready to judge.

        Raises:
            FileNotFoundError: the folder or a file is missing; the message names it.
        """
        folder = locate(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: run python -m experiments.train_detector")
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        detector = cls(**config)
        detector.load_state_dict(load_file(folder / WEIGHTS))
        return detector.to(device).eval()


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def _softmax(cells: Tensor, absent: Tensor) -> Tensor:
    scores = torch.cat([cells.flatten(2), absent[..., None]], -1).float()
    return scores.softmax(-1)[..., :-1].view_as(cells)
