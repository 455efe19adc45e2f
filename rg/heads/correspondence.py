"""Correspondence: the same point of a thing has the same vector in every image of it (Luo et al., 2024, 3.2)."""

from math import nan
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rg.heads.relative import RelativeHead, flat_index, pick
from rg.metrics.keypoints import box_side, measurable, pck
from rg.points import Size, cells, rescale

ALPHAS = (0.05, 0.1)


class CorrespondenceHead(RelativeHead):
    """Reads which point of a thing a place shows. It is trained on pairs of images and points followed in both.

    Args:
        repulsion: share of the energy that keeps what was at a source point from staying there, against ghosts: 0.5 in
            the authors' code, 0 in the paper.
        temperature: of the cosines in the loss.
        hyperparameters: see ReadoutHead.
    """

    def __init__(self, *, repulsion: float = 0.0, temperature: float = 0.07, **hyperparameters: Any) -> None:
        if not 0 <= repulsion < 1:
            raise ValueError(f"repulsion: expected 0 <= repulsion < 1, got {repulsion}")
        if temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        super().__init__(**hyperparameters)

    @property
    def readout_span(self) -> None:
        """None: the authors' latent range factor leaves this energy alone."""
        return

    def loss(self, readout: Tensor, batch: dict[str, Any]) -> Tensor:
        """Mean over pairs of the symmetric cross-entropy over the points that both images show.

        A point's vector in one image is compared with every cell of the other: softmax of cosine / temperature,
        against the cell in which the point is there; both ways, averaged (Luo et al., 2024, section 3.2).

        Args:
            readout: (B, 2, C, H, W).
            batch: of pairs, see rg.data.samples; a pair without a point that both show adds nothing.

        Raises:
            ValueError: the groups are no pairs.
        """
        pair, points = _pair(readout), batch["points"]
        size = (readout.shape[-2], readout.shape[-1])
        places = cells(points[..., :2], tuple(batch["image"].shape[-2:]), size).unbind(2)
        entropy = sum(
            F.cross_entropy(
                (cosines(pair[i], pair[1 - i], places[i]) / self.hparams.temperature).transpose(1, 2),
                flat_index(places[1 - i], size),
                reduction="none",
            )
            for i in (0, 1)
        )
        seen = (points[..., 2] > 0).all(-1)
        return (entropy * seen / 2).sum(1).div(seen.sum(1).clamp_min(1)).mean()

    def metrics(self, readout: Tensor, batch: dict[str, Any], timestep: int) -> None:
        """Logs PCK of the nearest neighbours of the first image's points, by the box of those seen in the second."""
        for alpha, values in zip(ALPHAS, pair_pck(*_pair(readout), batch), strict=True):
            counted = values[~values.isnan()]
            mean = counted.sum() / max(len(counted), 1)  # every rank logs, also one whose pairs do not count
            self.log(f"val/pck@{alpha}_t{timestep}", mean, batch_size=len(counted), sync_dist=True)

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


def _pair(readout: Tensor) -> tuple[Tensor, Tensor]:
    if readout.ndim != 5 or readout.shape[1] != 2:
        raise ValueError(
            f"data: CorrespondenceHead expects readouts (B,2,C,H,W) of pairs of images, got {tuple(readout.shape)}; "
            "use data=correspondence"
        )
    return readout[:, 0], readout[:, 1]


def cosines(first: Tensor, second: Tensor, points: Tensor) -> Tensor:
    """Cosines of maps (B, C, H, W): the first's vectors at cells (B, n, 2), the second's at all: (B, n, H * W)."""
    return F.normalize(pick(first, points), dim=-1) @ F.normalize(second, dim=1).flatten(2)


def nearest(first: Tensor, second: Tensor, points: Tensor, image_size: Size) -> Tensor:
    """Where the second map is most like the first at some points.

    Args:
        first, second: (B, C, H, W), of any features.
        points: (B, n, 2) in pixels of an image of image_size (height, width).

    Returns:
        (B, n, 2), the centres of cells in pixels of the same.
    """
    size = (first.shape[-2], first.shape[-1])
    best = cosines(first, second, cells(points, image_size, size)).argmax(-1)
    return rescale(torch.stack([best % size[1], best // size[1]], -1).to(points), size, image_size)


def pair_pck(first: Tensor, second: Tensor, batch: dict[str, Any]) -> list[Tensor]:
    """For each of ALPHAS, PCK of the nearest neighbours in each pair: (B,), nan without a size to measure by.

    Args:
        first, second: (B, C, H, W), maps of the images of each pair.
        batch: of pairs, see rg.data.samples.
    """
    source, target = batch["points"].unbind(2)
    seen = (batch["points"][..., 2] > 0).all(-1)
    found = nearest(first, second, source[..., :2], tuple(batch["image"].shape[-2:]))
    counted = measurable(target[..., :2], seen)
    shares = found.new_full((len(found), len(ALPHAS)), nan)
    found, points, seen = found[counted], target[counted, :, :2], seen[counted]
    shares[counted] = pck(found, points, seen, box_side(points, seen), ALPHAS).to(shares)
    return list(shares.T.contiguous())


def _similarity(readout: Tensor, vectors: Tensor, points: Tensor, counted: Tensor) -> Tensor:
    """Mean of (1 + cos) / 2 over the counted of n points: (B,)."""
    similarity = (1 + F.cosine_similarity(pick(readout, points), vectors, dim=-1)) / 2
    return (similarity * counted).sum(1) / counted.sum(1)
