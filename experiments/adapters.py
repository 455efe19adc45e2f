"""Adapters beside guidance, of finished evaluations: python -m experiments.adapters"""

import math
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from rg.cli import command
from rg.io.files import read_json, write_json, write_text
from rg.metrics.statistics import student_quantile


def records_of(run: Path) -> list[dict[str, Any]]:
    """The records of all images of an evaluation, in their order.

    Raises:
        FileNotFoundError: it is not finished.
    """
    if not (run / "results.json").is_file():
        raise FileNotFoundError(f"{run}: expected a finished evaluation with results.json, found none")
    return [read_json(path) for path in sorted((run / "samples").glob("[0-9]*.json"))]


def scores(records: list[dict[str, Any]], condition: str, judge: str, alpha: str) -> Tensor:
    """PCK of each image (N,), relative to the target's box; nan where it cannot be measured."""
    found = [record["judges"][judge][condition]["pck"]["target"][alpha] for record in records]
    return torch.tensor([math.nan if share is None else share for share in found])


def compare(ours: Tensor, baseline: Tensor) -> dict[str, float]:
    """Means over the images that both measure, and their paired difference with its error and 95 % interval."""
    if len(ours) != len(baseline):
        raise ValueError(f"expected as many images in both evaluations, found {len(ours)} and {len(baseline)}")
    both = ~(ours.isnan() | baseline.isnan())
    ours, baseline = ours[both], baseline[both]
    difference, n = (ours - baseline).double(), len(ours)
    sem = float(difference.std()) / math.sqrt(n) if n > 1 else math.nan
    half = student_quantile(n - 1) * sem if n > 1 else math.nan
    mean = float(difference.mean())
    found = {"baseline": float(baseline.mean()), "ours": float(ours.mean()), "difference": mean}
    return found | {"sem": sem, "low": mean - half, "high": mean + half, "n": n}


def rows_of(plain: Path, adapters: dict[str, Path]) -> list[dict[str, Any]]:
    """A row for each of guided, adapter, adapter + guidance, judge and alpha, against unguided from the same seeds."""
    without = records_of(plain)
    conditions: list[tuple[str, list[dict[str, Any]], str, Path]] = [("guided", without, "guided", plain)]
    for name, run in adapters.items():
        records = records_of(run)
        prompts = [[record["prompt"] for record in some] for some in (without, records)]
        if prompts[0] != prompts[1]:
            raise ValueError(f"{run}: expected the poses and prompts of {plain}, found others")
        conditions += [(name, records, "unguided", run), (f"{name} + guidance", records, "guided", run)]
    rows = []
    for name, records, condition, run in conditions:
        command = read_json(run / "results.json")["command"]
        seconds = sum(record["seconds"][condition] for record in records) / len(records)
        shared = {"name": name, "command": command, "seconds": seconds}
        for judge in without[0]["judges"]:
            for alpha in ("0.05", "0.1"):
                found = compare(scores(records, condition, judge, alpha), scores(without, "unguided", judge, alpha))
                rows.append({"metric": f"PCK@{alpha} {judge}", **shared, **found})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | score | unguided | value | paired difference (95 % interval) | images | seconds |", "|---" * 7 + "|"]
    lines += [
        f"| {row['name']} | {row['metric']} | {row['baseline']:.3f} | {row['ours']:.3f} "
        f"| {row['difference']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}) | {row['n']} | {row['seconds']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


@command("experiments/adapters")
def main(cfg: DictConfig) -> None:
    """Writes the rows and their table, and prints it."""
    adapters = {name: Path(run) for name, run in cfg.adapters.items()}
    rows = rows_of(Path(cfg.plain), adapters)
    write_json(Path(cfg.out) / "adapters.json", rows)
    write_text(Path(cfg.out) / "adapters.md", table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
