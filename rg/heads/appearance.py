"""Relative appearance: how alike two pictures look, place by place (Luo et al., 2024, section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rg.heads.relative import RelativeHead


class AppearanceHead(RelativeHead):
    """Reads what a place looks like. Guides; it has no loss to train with."""

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
