"""A sweep of trainings, seeds averaged, or of evaluations as a table:

python -m experiments.quality.sweeps run=outputs/sweep_dataset_size
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from experiments.quality.ship import final_scores, read_yaml
from rg.cli import command
from rg.io.files import read_json, write_text
from rg.io.records import validate
from rg.metrics.statistics import of_mean
from rg.report import Results


def read_runs(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Settings of a sweep -> last held-out scores, val/NAME_tLEVEL -> value, of its runs; these differ in seed alone.

    Raises:
        FileNotFoundError: there is no finished run, or one was never scored.
        ValueError: a file of a run is damaged, or runs differ in what was scored.
    """
    runs: dict[str, list[dict[str, float]]] = {}
    for head in sorted(folder.glob("*/head/head.json")):
        run_dir = head.parents[1]
        if not run_dir.is_symlink():
            overrides = read_yaml(run_dir / ".hydra" / "overrides.yaml", list[str])
            settings = " ".join(o for o in overrides if not o.startswith(("+sweep=", "seed=", "resume=")))
            runs.setdefault(settings, []).append(final_scores(run_dir))
            expected = next(iter(runs.values()))[0]
            if (found := runs[settings][-1]).keys() != expected.keys():
                raise ValueError(f"{run_dir}: expected the scores {sorted(expected)}, found {sorted(found)}")
    if not runs:
        raise FileNotFoundError(f"{folder}: expected runs with head/head.json, found none")
    return runs


def training_table(folder: Path) -> str:
    """Markdown: a table per held-out score, a row per setting, a column per noise level; ± is half a 95 % interval."""
    runs = read_runs(folder)
    columns = [column for column in next(iter(runs.values()))[0] if "loss" not in column]
    tables = []
    for name in dict.fromkeys(column.rsplit("_t", 1)[0] for column in columns):
        parts = (column.rsplit("_t", 1) for column in columns)
        levels = sorted((level for owner, level in parts if owner == name), key=int)
        header = [name.removeprefix("val/"), *(f"t = {level}" for level in levels), "mean", "seeds"]
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        for settings, scores in runs.items():
            rows = [[found[f"{name}_t{level}"] for level in levels] for found in scores]
            lines.append(f"| {settings} | {' | '.join(_cells(rows))} | {len(rows)} |")
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def _cells(rows: Sequence[Sequence[float]]) -> list[str]:
    """Of runs' scores at every noise level: their means, and that over the levels, which is one number of a run."""
    values = torch.tensor([[*row, sum(row) / len(row)] for row in rows], dtype=torch.float64)
    if len(values) == 1:
        return [f"{value:.3f}" for value in values[0].tolist()]
    estimates = [of_mean(column, 0.0) for column in values.T]
    return [f"{e.ours:.3f} ± {e.high - e.ours:.3f}" for e in estimates]


def evaluation_table(folder: Path) -> str:
    """One row per finished run below `folder`: its overrides, every judge's PCK at every alpha and confidence.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: a file of a run is damaged, or runs differ in their judges or tolerances.
    """
    runs: list[tuple[dict[str, Any], list[str]]] = []
    for path in sorted(folder.glob("*/results.json")):
        if path.parent.is_symlink():
            continue
        overrides = read_yaml(path.parent / ".hydra" / "overrides.yaml", list[str])
        results = validate(Results, read_json(path), str(path)).model_dump()
        if runs and (found := _columns(results)) != (expected := _columns(runs[0][0])):
            raise ValueError(f"{path}: judges: expected {expected}, found {found}")
        runs.append((results, [o for o in overrides if not o.startswith("+")]))
    if not runs:
        raise FileNotFoundError(f"{folder}: expected runs with results.json, found none")
    common = set.intersection(*(set(overrides) for _, overrides in runs)) if len(runs) > 1 else set()
    columns = _columns(runs[0][0])
    header = ["settings", *columns, "images"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    rows = [(" ".join(o for o in overrides if o not in common), results, "guided") for results, overrides in runs]
    rows.sort(key=lambda row: -_values(row[1], "guided")[0])
    rows += [(name, runs[0][0], name) for name in ("unguided", "ceiling")]
    for title, results, condition in rows:
        cells = [title, *(f"{value:.3f}" for value in _values(results, condition)), str(results["images"])]
        lines.append(f"| {' | '.join(cells)} |")
    return f"In common: {' '.join(sorted(common)) or 'nothing'}\n\n" + "\n".join(lines) + "\n"


def _columns(results: Mapping[str, Any]) -> list[str]:
    """What `_values` gives, by name."""
    judges = results["judges"].items()
    return [
        f"{name} ({judge})" for judge, scores in judges for name in (*map("PCK@{}".format, scores["pck"]), "confidence")
    ]


def _values(results: Mapping[str, Any], condition: str) -> list[float]:
    rows = [row for scores in results["judges"].values() for row in (*scores["pck"].values(), scores["confidence"])]
    return [row[condition]["mean"] for row in rows]


@command("experiments/sweeps")
def main(cfg: DictConfig) -> None:
    """Prints the tables of the folder given, and writes them there."""
    folder = Path(cfg.run)
    content = (evaluation_table if any(folder.glob("*/results.json")) else training_table)(folder)
    write_text(folder / "table.md", content)
    print(content + f"\n{folder / 'table.md'}")


if __name__ == "__main__":
    main()
