"""Relative readouts: maps of vectors that mean something only beside another picture's (Luo et al., 2024, 3.2)."""

from typing import NoReturn

from torch import Tensor

from rg.points import Size
from rg.readout import ReadoutHead


class RelativeHead(ReadoutHead):
    """What appearance and correspondence share: the aggregate itself is the readout, there are no output convolutions.

    The readout is (B, projection_dim, H, W), nowhere negative, so that cosines lie in [0, 1]. A subclass gives the
    energy, whose target is what it reads of the reference's readout; boxes and points are in cells of the readout
    (rg.points.cells, rg.points.box_cells).
    """

    def forward(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """Readout of taps (B, C_l, h_l, w_l), coarse to fine, and time embedding (B, E)."""
        return self.aggregation(features, time_embedding)

    def encode_target(self, control: Tensor, *, readout_size: Size, image_size: Size) -> NoReturn:
        """Raises ValueError: no picture or pose says what a relative readout should be."""
        raise ValueError(
            f"control: {type(self).__name__} compares with the readout of a reference picture; a control of shape "
            f"{tuple(control.shape)} cannot be its target"
        )


def pick(readout: Tensor, points: Tensor) -> Tensor:
    """The vectors of readouts (B, C, H, W) at cells (B or 1, n, 2) of (column, row): (B, n, C).

    A cell outside gives the nearest one's vector.
    """
    batch, channels, height, width = readout.shape
    x, y = points[..., 0].clamp(0, width - 1), points[..., 1].clamp(0, height - 1)
    index = (y * width + x)[..., None].expand(batch, -1, channels)
    # Channels last, as heads give their readouts: so the gradient lies too.
    return readout.permute(0, 2, 3, 1).flatten(1, 2).gather(1, index)
