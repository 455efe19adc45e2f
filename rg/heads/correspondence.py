"""Correspondence: the same point of a thing has the same vector in every picture of it (Luo et al., 2024, 3.2)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rg.heads.relative import RelativeHead, pick


class CorrespondenceHead(RelativeHead):
    """Reads which point of a thing a place shows. Guides; it has no loss to train with.

    Args:
        repulsion: share of the energy that keeps what was at a source point from staying there, against ghosts: 0.5 in
            the authors' code, 0 in the paper.
        hyperparameters: see ReadoutHead.
    """

    def __init__(self, *, repulsion: float = 0.0, **hyperparameters: Any) -> None:
        if not 0 <= repulsion < 1:
            raise ValueError(f"repulsion: expected 0 <= repulsion < 1, got {repulsion}")
        super().__init__(**hyperparameters)

    @property
    def readout_span(self) -> None:
        """None: the authors' latent range factor leaves this energy alone."""
        return

    def energy(self, readout: Tensor, target: Tensor, *, source: Tensor, destination: Tensor) -> Tensor:
        """(repulsion - 1) * mean S(source, destination) + repulsion * mean S(source, source), per sample: (B,).

        S(a, b) = (1 + cos) / 2 of the reference's vector at a and the readout's at b. A pair with a point outside the
        map does not count.

        Args:
            readout: (B, C, H, W).
            target: (B or 1, n, C), the reference's vectors at the source points (rg.heads.relative.pick).
            source, destination: (B or 1, n, 2) cells of (column, row).

        Raises:
            ValueError: a sample has no pair inside.
        """
        size = readout.new_tensor([readout.shape[-1], readout.shape[-2]])
        inside = [((points >= 0) & (points < size)).all(-1) for points in (source, destination)]
        counted = (inside[0] & inside[1]).expand(len(readout), -1)
        if not counted.any(1).all():
            raise ValueError(
                f"points: expected at least one pair inside a readout of {readout.shape[-2]}x{readout.shape[-1]} cells "
                f"for every image, got sources {source.tolist()} and destinations {destination.tolist()}"
            )
        repulsion = self.hparams.repulsion
        energy = (repulsion - 1) * _similarity(readout, target, destination, counted)
        if repulsion:
            energy = energy + repulsion * _similarity(readout, target, source, counted)
        return energy


def _similarity(readout: Tensor, vectors: Tensor, points: Tensor, counted: Tensor) -> Tensor:
    """Mean of (1 + cos) / 2 over the counted of n points: (B,)."""
    similarity = (1 + F.cosine_similarity(pick(readout, points), vectors, dim=-1)) / 2
    return (similarity * counted).sum(1) / counted.sum(1)
