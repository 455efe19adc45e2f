"""Edges of any picture, by OpenCV."""

import cv2
import torch
from torch import Tensor

from data_prep.annotators.lines import LineAnnotator
from data_prep.sources import SourceSample


class Canny(LineAnnotator):
    """Edges by the detector of Canny (1986) on the grey picture at the source's resolution.

    Args:
        low, high: thresholds of |dx| + |dy|, by 3x3 Sobel filters on grey levels 0..255: above `high` lies an edge,
            above `low` its continuation.
        line_width: see LineAnnotator.

    Raises:
        ValueError: not 0 < low <= high, or a width that cannot be drawn.
    """

    def __init__(self, *, low: float = 100, high: float = 200, line_width: int = 2) -> None:
        if not 0 < low <= high:
            raise ValueError(f"expected 0 < low <= high, got low={low}, high={high}")
        super().__init__(line_width=line_width)
        self.low, self.high = low, high

    def find(self, sample: SourceSample) -> Tensor:
        """Edges of one pixel's width: (H, W) bool."""
        grey = cv2.cvtColor(sample.image.permute(1, 2, 0).contiguous().numpy(), cv2.COLOR_RGB2GRAY)
        return torch.from_numpy(cv2.Canny(grey, self.low, self.high)) > 0
