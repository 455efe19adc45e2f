"""Every rule of guidance on the same poses and seeds, as curves over strength: python -m experiments.rules

A cell is a rule at a strength with a seed, and a run folder of rg.evaluate: finished ones are read, a broken-off one
goes on. Leaves table.md and pareto.png in `out`.
"""

import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig
from rich.progress import track

from experiments.comparison.cells import Cell, Measured, measure
from experiments.comparison.table import pareto, rows, table
from rg.cli import claimed, command, compose_config
from rg.io.figures import save_figure
from rg.io.files import write_text


@dataclass(frozen=True)
class Choice:
    """A rule at a strength, and the configurations of its cells, one for each seed."""

    rule: str
    strength: float
    cells: list[DictConfig]


def choices(cfg: DictConfig) -> Iterator[Choice]:
    """What is to be run, the default at strength 1 first: its images without guidance serve all the others.

    Raises:
        ValueError: there is no such default, or fewer than two images.
    """
    if cfg.default not in cfg.rules:
        raise ValueError(f"default: expected one of {sorted(cfg.rules)}, got {cfg.default!r}")
    if cfg.images < 2:
        raise ValueError(f"images: expected at least 2, got {cfg.images}")
    wanted = [(name, strength) for name, rule in cfg.rules.items() for strength in rule.strengths]
    first = (cfg.default, 1.0)
    for name, strength in [first, *(pair for pair in wanted if pair != first)]:
        common = [*cfg.overrides, *cfg.rules[name].overrides, f"split={cfg.split}", f"images={cfg.images}"]
        folder = Path(cfg.out) / f"{name}-{strength:g}"
        cells = [
            compose_config(
                "evaluate",
                [
                    *common,
                    f"++guidance.strength={strength}",
                    "guidance.keep_readouts=false",
                    f"seed={seed}",
                    f"run_dir={folder / str(seed)}",
                ],
            )
            for seed in cfg.seeds
        ]
        yield Choice(name, strength, cells)


def run(cfg: DictConfig) -> str:
    """Runs what is missing, draws pareto.png, and returns the table."""
    planned = list(choices(cfg))  # whatever does not compose is said before any image is made
    found: dict[tuple[str, float], list[Measured]] = {}
    for choice in track(planned, description="rules", disable=len(planned) < 2):
        found[choice.rule, choice.strength] = measured = []
        for number, cell in enumerate(choice.cells):
            plain = Path(planned[0].cells[number].run_dir)
            with claimed(Path(cell.run_dir)):
                measured.append(measure(Cell(cell, Path(cell.run_dir), plain)))
    lines = rows(found, (cfg.default, 1.0))
    save_figure(pareto(lines), Path(cfg.out) / "pareto.png")
    return table(lines)


@command("experiments/rules")
def main(cfg: DictConfig) -> None:
    """Compares the rules and prints their table."""
    command_line = shlex.join(["python", "-m", "experiments.rules", *sys.argv[1:]])
    with claimed(Path(cfg.out)):
        content = run(cfg) + f"\n`{command_line}`\n"
        write_text(Path(cfg.out) / "table.md", content)
    print(content + f"\n{cfg.out}/table.md\n{cfg.out}/pareto.png")


if __name__ == "__main__":
    main()
