"""The rules beside each other: a row for each strength, and a picture of control against what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from experiments.comparison.cells import Measured
from rg.io.figures import curves
from rg.metrics.statistics import paired_gain

Choice = tuple[str, float]  # rule, strength
UNGUIDED = "unguided"


@dataclass(frozen=True)
class Row:
    """A rule at a strength.

    scores: score -> mean over images. gains, against: of each score the paired difference to no guidance and to the
        default ("mean", "low", "high"), None where it is that itself.
    diversity: RMS difference of the images of one pose and prompt with different seeds; nan for one seed.
    forward, backward: rows of the denoiser for each image. seconds: for each image.
    """

    rule: str
    strength: float
    scores: dict[str, float]
    gains: dict[str, dict[str, float] | None]
    against: dict[str, dict[str, float] | None]
    kernel: float | None
    diversity: float
    forward: float
    backward: float
    seconds: float


def rows(found: Mapping[Choice, Sequence[Measured]], default: Choice) -> list[Row]:
    """A row for no guidance, then one for each rule and strength, of cells that differ in their seed alone."""
    plain = means(found[default], UNGUIDED)
    usual = means(found[default], "guided")
    lines = [row((UNGUIDED, 0.0), found[default], UNGUIDED, None, usual)]
    lines += [
        row(choice, cells, "guided", plain, None if choice == default else usual) for choice, cells in found.items()
    ]
    return lines


def row(
    choice: Choice,
    cells: Sequence[Measured],
    condition: str,
    plain: Mapping[str, Tensor] | None,
    usual: Mapping[str, Tensor] | None,
) -> Row:
    """One row, of the images of a condition."""
    values = means(cells, condition)
    kernel = [cell.kernel[condition] for cell in cells if cell.kernel]
    guided = condition == "guided"
    return Row(
        *choice,
        scores={name: float(value.nanmean()) for name, value in values.items()},
        gains={name: _difference(plain, name, value) for name, value in values.items()},
        against={name: _difference(usual, name, value) for name, value in values.items()},
        kernel=sum(kernel) / len(kernel) if kernel else None,
        diversity=diversity([cell.images[condition] for cell in cells]),
        forward=sum(cell.calls["forward"] for cell in cells) / len(cells) if guided else float("nan"),
        backward=sum(cell.calls["backward"] for cell in cells) / len(cells) if guided else 0.0,
        seconds=sum(cell.seconds[condition] for cell in cells) / len(cells),
    )


def means(cells: Sequence[Measured], condition: str) -> dict[str, Tensor]:
    """Score -> of each image the mean over seeds (N,): what is paired over images counts a pose once."""
    return {
        name: torch.stack([cell.scores[condition][name] for cell in cells]).nanmean(0)
        for name in cells[0].scores[condition]
    }


def _difference(before: Mapping[str, Tensor] | None, name: str, after: Tensor) -> dict[str, float] | None:
    if before is None:
        return None
    both = ~(before[name].isnan() | after.isnan())
    return paired_gain(before[name][both], after[both]) if both.sum() > 1 else None


def diversity(seeds: Sequence[Tensor]) -> float:
    """RMS difference between images (N, 3, H, W) of different seeds, a mean over images and pairs of seeds."""
    pairs = [(a - b).flatten(1).square().mean(1).sqrt().mean() for a, b in combinations(seeds, 2)]
    return float(torch.stack(pairs).mean()) if pairs else float("nan")


def table(lines: Sequence[Row]) -> str:
    """Markdown: scores with their paired difference to the default, and what each rule takes."""
    names = list(lines[0].scores)
    costs = ("kernel distance", "diversity", "forward", "backward", "seconds")
    out = ["| " + " | ".join(["rule", "strength", *names, *costs]) + " |", "|---" * (len(names) + 7) + "|"]
    for line in lines:
        cells = [line.rule, f"{line.strength:g}"]
        for name in names:
            gain = line.against[name]
            beside = " ({low:+.3f} to {high:+.3f})".format(**gain) if gain else ""
            cells.append(f"{line.scores[name]:.3f}{beside}")
        cells.append("-" if line.kernel is None else f"{line.kernel:.4f}")
        cells.append(f"{line.diversity:.3f}")
        cells.append("-" if line.forward != line.forward else f"{line.forward:.0f}")
        out.append("| " + " | ".join([*cells, f"{line.backward:.0f}", f"{line.seconds:.2f}"]) + " |")
    note = "In brackets: 95 % interval of the paired difference to the default. words: shirt and trousers as asked for."
    return "\n".join(out) + f"\n\n{note} forward, backward: rows of the denoiser for each image.\n"


def pareto(lines: Sequence[Row]) -> Any:
    """Control (PCK at the middle tolerance, by each judge) against words as asked for and against seconds."""
    alphas = list(dict.fromkeys(name.split()[0] for name in lines[0].scores if name.startswith("PCK")))
    middle = alphas[len(alphas) // 2]
    panels = {}
    for name in (name for name in lines[0].scores if name.split()[0] == middle):
        for label, x in (("shirt and trousers as asked for", "words"), ("seconds for each image", "seconds")):
            drawn: dict[str, list[tuple[float, float, str]]] = {}
            for line in sorted(lines, key=lambda line: line.strength):
                across = line.seconds if x == "seconds" else line.scores["words"]
                drawn.setdefault(line.rule, []).append((across, line.scores[name], f"{line.strength:g}"))
            panels[label, name] = drawn
    return curves(panels)
