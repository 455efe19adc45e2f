"""Relative readouts: maps of vectors that mean something only beside another image's (Luo et al., 2024, 3.2)."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from rg.heads.base import ReadoutHead
from rg.points import Size


class RelativeHead(ReadoutHead):
    """What appearance and correspondence share: the aggregate itself is the readout, there are no output convolutions.

    The readout is (B, projection_dim, H, W), nowhere negative, so that cosines lie in [0, 1]. A subclass gives the
    energy, whose target is what it reads of the reference's readout; boxes and points are in cells of the readout
    (rg.points.cells, rg.points.box_cells). It is trained on groups of images (rg.data.samples), and its loss and
    metrics take the readouts (B, G, projection_dim, H, W) of B groups.
    """

    def forward(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """Readout of taps (B, C_l, h_l, w_l), coarse to fine, and time embedding (B, E)."""
        return self.aggregation(features, time_embedding)

    def control(self, batch: dict[str, Any]) -> Tensor:
        """The labels of a batch, which `encode_target` refuses."""
        return batch["label"]

    def readout(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Readouts (B, G, P, H, W) of groups of clean latents (B, G, C, h, w), or of single ones without the axis G.

        As in the authors' training, the images of a group share one of timesteps (B,), and each has noise of its own.
        """
        if latents.ndim == 4:
            return super().readout(latents, noise, timesteps)
        size = latents.shape[1]
        readouts = super().readout(latents.flatten(0, 1), noise.flatten(0, 1), timesteps.repeat_interleave(size))
        return readouts.unflatten(0, (-1, size))

    def encode_target(self, control: Tensor, *, readout_size: Size, image_size: Size) -> NoReturn:
        """Raises ValueError: no image or pose says what a relative readout should be."""
        raise ValueError(
            f"control: {type(self).__name__} compares with the readout of a reference image; a control of shape "
            f"{tuple(control.shape)} cannot be its target"
        )

    def preview(self, readout: Tensor) -> Tensor:
        """The three main components of all vectors in readouts (..., C, H, W) as colours: (..., 3, H, W) in [0, 1].

        Equal vectors have equal colours, across images too.
        """
        vectors = readout.movedim(-3, -1)
        centred = vectors - vectors.flatten(0, -2).mean(0)
        flat = centred.flatten(0, -2)
        axes = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:]
        # An eigenvector's sign is arbitrary: its largest entry is made positive.
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        shades = (centred @ axes).movedim(-1, -3)
        low, high = (shades.movedim(-3, 0).flatten(1).quantile(q, 1)[:, None, None] for q in (0.01, 0.99))
        return ((shades - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)


def flat_index(points: Tensor, size: Size) -> Tensor:
    """Places (..., n) in a flattened map of cells (..., n, 2) of (column, row); one outside is the nearest."""
    x, y = points[..., 0].clamp(0, size[1] - 1), points[..., 1].clamp(0, size[0] - 1)
    return y * size[1] + x


def pick(readout: Tensor, points: Tensor) -> Tensor:
    """The vectors of readouts (B, C, H, W) at cells (B or 1, n, 2) of (column, row): (B, n, C).

    A cell outside gives the nearest one's vector.
    """
    batch, channels, height, width = readout.shape
    index = flat_index(points, (height, width))[..., None].expand(batch, -1, channels)
    # Channels last, the memory format of readouts, so that the gradient has it too.
    return readout.permute(0, 2, 3, 1).flatten(1, 2).gather(1, index)
