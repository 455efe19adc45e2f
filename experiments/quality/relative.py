"""What a relative head reads on held-out groups, beside the raw features of the model.

Correspondence: PCK@0.1 of nearest neighbours. Appearance and identity: how often the positive is nearer than a
negative, and the equal error rates of telling the same from another by the distance.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_eer

from rg.data.samples import Batch, Groups
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import ALPHAS, CorrespondenceHead, pair_pck
from rg.heads.relative import RelativeHead
from rg.metrics.statistics import Estimate, by_resampling, of_mean

TURNED = 20.0  # degrees from which on a head counts as turned out of the plane
WIDTHS = ("tap_channels", "time_embed_dim", "projection_dim", "norm_groups", "output_scale", "prompt", "seed")
# From readouts (B, G, C, H, W) and their batch to named scores (B,), nan where one does not apply.
Score = Callable[[Tensor, Batch], dict[str, Tensor]]


class RawFeatures(RelativeHead):
    """All taps side by side, resized to the size of a head's readout; reads under the same noise as that head."""

    def forward(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """(B, sum of C_l, H, W)."""
        size = [side * self.hparams.output_scale for side in features[-1].shape[-2:]]
        return torch.cat([F.interpolate(f, size, mode="bilinear", align_corners=False) for f in features], 1)


def correspondence_scores(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
    """PCK@0.1 of all pairs, and of portraits in which the head turns."""
    values = pair_pck(maps[:, 0], maps[:, 1], batch)[ALPHAS.index(0.1)]
    turned = batch["turn"] >= TURNED
    return {"PCK@0.1": values, f"PCK@0.1, head turned by {TURNED:.0f}°": values.where(turned, torch.nan)}


def appearance_scores(head: AppearanceHead) -> Score:
    """Distances to the positive, to each negative, and to a stranger: the next group's positive where none is given."""

    def score(maps: Tensor, batch: Batch) -> dict[str, Tensor]:
        positive, negatives = head.distances(maps)
        stranger = head.energy(maps[:, 1].roll(1, 0), maps[:, 0])
        alone = torch.tensor(len(maps) == 1)
        return {"positive": positive, "stranger": stranger.masked_fill(alone, torch.nan), **negatives}

    return score


def collect(
    reader: RelativeHead, batches: DataLoader[Batch], timestep: int, scores: dict[str, tuple[Score, slice]]
) -> dict[str, dict[str, Tensor]]:
    """All values of every score on a slice of the channels of a reader's maps: row -> name -> (N,)."""
    rows: dict[str, dict[str, list[Tensor]]] = {row: {} for row in scores}
    with torch.no_grad():
        for batch in batches:
            maps = reader.readout_at(batch, timestep)
            for row, (score, channels) in scores.items():
                for name, values in score(maps[:, :, channels], batch).items():
                    rows[row].setdefault(name, []).append(values)
    return {row: {name: torch.cat(parts) for name, parts in values.items()} for row, values in rows.items()}


def summarise(values: dict[str, Tensor]) -> dict[str, float]:
    """The numbers of the table: means of scores, or accuracies and equal error rates where there are distances."""
    if "positive" not in values:
        return {name: float(score.nanmean()) for name, score in values.items()}
    numbers = {}
    for name, distances in values.items():
        if name != "positive":
            known = ~distances.isnan()
            positive, negative = values["positive"][known], distances[known]
            numbers[f"accuracy, {name}"] = float((positive < negative).float().mean())
            numbers[f"equal error rate, {name}"] = _error_rate(positive, negative)
    return numbers


def measure(head: RelativeHead, samples: Groups, timestep: int, batch_size: int = 16) -> dict[str, dict[str, Tensor]]:
    """Values of every score at one noise level, row -> name -> (N,): the head, all raw taps side by side, each tap."""
    score = correspondence_scores if isinstance(head, CorrespondenceHead) else appearance_scores(head)
    raw = RawFeatures(**{name: head.hparams[name] for name in WIDTHS}).attach_backbone(head.backbone).eval()
    stops = torch.tensor(head.hparams.tap_channels).cumsum(0).tolist()
    taps = [slice(stop - width, stop) for stop, width in zip(stops, head.hparams.tap_channels, strict=True)]
    parts = {"all raw taps": slice(None)} | {f"raw tap {i}": part for i, part in enumerate(taps)}
    batches = DataLoader(samples, batch_size=batch_size)
    found = collect(head, batches, timestep, {"head": (score, slice(None))})
    return found | collect(raw, batches, timestep, {row: (score, part) for row, part in parts.items()})


def relative_estimates(head: RelativeHead, samples: Groups) -> dict[str, Estimate]:
    """Every score of the head at each of its noise levels. The baseline is the best of the raw taps, side by side or
    alone, chosen on the scored samples themselves: it is optimistic."""
    estimates = {}
    for timestep in head.hparams.val_timesteps:
        rows = measure(head, samples, timestep)
        numbers = {row: summarise(values) for row, values in rows.items()}
        for name in numbers["head"]:
            baseline = (min if "error" in name else max)(numbers[row][name] for row in rows if row != "head")
            estimates[f"{name}, t={timestep}"] = _estimate(rows["head"], name, baseline)
    return estimates


def _estimate(values: dict[str, Tensor], name: str, baseline: float) -> Estimate:
    """Of one of the names that `summarise` gives."""
    if name in values:
        return of_mean(values[name], baseline)
    kind, negative = name.split(", ", 1)
    known = ~values[negative].isnan()
    near, far = values["positive"][known], values[negative][known]
    if kind == "accuracy":
        return of_mean((near < far).double(), baseline)
    return by_resampling(lambda chosen: _error_rate(near[chosen], far[chosen]), len(near), baseline)


def _error_rate(near: Tensor, far: Tensor) -> float:
    """Equal error rate of telling distances near (N,) from far (N,)."""
    labels = torch.cat([torch.zeros_like(near), torch.ones_like(far)]).long()
    return float(binary_eer(torch.cat([near, far]), labels))
