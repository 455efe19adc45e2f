"""Relative appearance: how alike two images look, place by place (Luo et al., 2024, section 3.2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rg.heads.relative import RelativeHead


class AppearanceHead(RelativeHead):
    """Reads what a place looks like, or who is there. It is trained on an anchor, a positive and some negatives.

    Args:
        margin: by which a negative should be farther from the anchor than the positive.
        negatives: what the third and further images of a group are, and their weights in the loss; a weight of 0
            leaves one to the metrics.
        hyperparameters: see ReadoutHead.
    """

    def __init__(
        self, *, margin: float = 0.5, negatives: dict[str, float] | None = None, **hyperparameters: Any
    ) -> None:
        negatives = {"edited": 1.0} if negatives is None else negatives
        if not negatives or min(negatives.values()) < 0 or not any(negatives.values()):
            raise ValueError(f"negatives: expected weights of at least 0 and one above, got {negatives}")
        super().__init__(**hyperparameters)

    def distances(self, readout: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the positive is from the anchor, (B,), and each of the negatives, (B,), by `energy`.

        Args:
            readout: (B, G, C, H, W): anchor, positive, and the negatives in the order of their names.

        Raises:
            ValueError: another number of images.
        """
        names = list(self.hparams.negatives)
        if readout.ndim != 5 or readout.shape[1] != 2 + len(names):
            raise ValueError(
                f"data: {type(self).__name__} expects readouts (B,{2 + len(names)},C,H,W) of groups of an anchor, a "
                f"positive and the negatives {names}, got {tuple(readout.shape)}; use data=appearance or data=identity"
            )
        anchor, *others = readout.unbind(1)
        positive, *negatives = (self.energy(other, anchor) for other in others)
        return positive, dict(zip(names, negatives, strict=True))

    def loss(self, readout: Tensor, batch: dict[str, Any]) -> Tensor:
        """Hinge max(0, margin + d(anchor, positive) - d(anchor, negative)), mean over groups and weighted negatives.

        See Luo et al., 2024, section 3.2; arguments and errors are those of `distances`.
        """
        positive, negatives = self.distances(readout)
        weights = self.hparams.negatives
        hinges = (weights[name] * F.relu(self.hparams.margin + positive - d).mean() for name, d in negatives.items())
        return sum(hinges) / sum(weights.values())

    def metrics(self, readout: Tensor, batch: dict[str, Any], timestep: int) -> None:
        """Logs for each negative how often it is farther from the anchor than the positive."""
        positive, negatives = self.distances(readout)
        for name, distance in negatives.items():
            right = (positive < distance).float().mean()
            self.log(f"val/accuracy_{name}_t{timestep}", right, batch_size=len(positive), sync_dist=True)

    def energy(self, readout: Tensor, target: Tensor, *, boxes: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Mean over places of 1 - cosine, per sample: (B,), in [0, 1].

        Args:
            readout: (B, C, H, W).
            target: (B or 1, C, H, W), readout of the reference.
            boxes: the reference's and the readout's box, each (B or 1, 4) of (left, top, right, bottom) in cells, right
                and bottom exclusive; both maps are cropped to theirs and resized to H x W before they are compared.

        Raises:
            ValueError: a box is empty or leaves the map.
        """
        if boxes is not None:
            target, readout = _crop(target, boxes[0]), _crop(readout, boxes[1])
        return (1 - F.cosine_similarity(readout, target, dim=1)).flatten(1).mean(1)


def _crop(maps: Tensor, boxes: Tensor) -> Tensor:
    """Each of maps (B, C, H, W) cut to its box (B or 1, 4), bilinearly resized to H x W."""
    size = (maps.shape[-2], maps.shape[-1])
    count = max(len(maps), len(boxes))
    parts = []
    for one, box in zip(maps.expand(count, -1, -1, -1), boxes.expand(count, -1).tolist(), strict=True):
        left, top, right, bottom = box
        if not (0 <= left < right <= size[1] and 0 <= top < bottom <= size[0]):
            raise ValueError(
                f"boxes: expected 0 <= left < right <= {size[1]} and 0 <= top < bottom <= {size[0]}, got {box}"
            )
        parts.append(F.interpolate(one[None, :, top:bottom, left:right], size, mode="bilinear", align_corners=False))
    return torch.cat(parts)
