"""Labels for pictures: an annotator turns source samples into labels, or says why one has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from data_prep.sources import Skip, SourceSample


@dataclass(frozen=True)
class Label:
    """What a picture is labelled with.

    Attributes:
        picture: (3, H, W) uint8, RGB, of the image's size.
        keypoints: (P, 18, 3) float32 of (x, y, visible) in pixels of the image; P = 0 where there are none.
    """

    picture: Tensor
    keypoints: Tensor


class Annotator(Protocol):
    """Labels samples: one Label or Skip for each."""

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]: ...
