"""Edges of any image, by OpenCV."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from data_prep.records import Label, Skip, SourceSample


class LineAnnotator:
    """Draws the edges that a subclass finds; an image without one is skipped by name.

    Args:
        line_width: thickness of a line in whole pixels of the image, about a cell of the readout: a thinner one fades
            when the label is resized to the readout's size. An even one lies half a pixel to the right and below.

    Raises:
        ValueError: the width is not a whole number of at least 1.
    """

    def __init__(self, *, line_width: int = 2) -> None:
        if line_width < 1 or line_width != int(line_width):
            raise ValueError(f"line_width: expected a whole number of pixels of at least 1, got {line_width}")
        self.line_width = int(line_width)

    def find(self, sample: SourceSample) -> Tensor:
        """Edges of one pixel's width: (H, W) bool."""
        raise NotImplementedError

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        return [self._draw(sample, self.find(sample)) for sample in samples]

    def _draw(self, sample: SourceSample, edges: Tensor) -> Label | Skip:
        if not edges.any():
            return Skip(f"{sample.name} has no label: no edge was found")
        brush = np.ones((self.line_width, self.line_width), np.uint8)
        lines = torch.from_numpy(cv2.dilate(edges.numpy().astype(np.uint8) * 255, brush))
        keypoints = torch.zeros(0, 18, 3) if sample.keypoints is None else sample.keypoints
        return Label(lines.expand(3, -1, -1), keypoints)


class Canny(LineAnnotator):
    """Edges by the detector of Canny (1986) on the grey image at the source's resolution.

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
