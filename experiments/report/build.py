"""The report: python -m experiments.report.build, or make report; make report-quick for the reduced one.

Runs what is missing, one run after the other; a stopped one goes on. Then everything is written anew from what is
stored: summary.json, tables.md and report.html, which needs no other file.
"""

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from experiments.report.figures import FIGURES, RUNS, Figure
from experiments.report.page import page
from experiments.report.store import Store
from experiments.report.summary import Finding, find
from rg.cli import command
from rg.io.files import read_json, write_json, write_text

log = logging.getLogger(__name__)
# Figures that other commands measure, stored in the same form as a figure of summary.json with "title" and "text".
OTHERS = ("fig8", "fig10")


def findings(store: Store) -> dict[str, tuple[Figure, list[tuple[Finding, str, int]]]]:
    """Of every figure with a stored run the findings, each with its command and seconds."""
    found = {}
    for figure in FIGURES:
        rows = []
        for row in figure.rows:
            stored = store.get(row.run)
            finding = find(row, stored) if stored else None
            if stored and finding:
                rows.append((finding, stored["command"], stored["seconds"]))
        if rows:
            found[figure.key] = (figure, rows)
    return found


def summarise(found: dict[str, tuple[Figure, list[tuple[Finding, str, int]]]]) -> dict[str, Any]:
    """{figure: its headline {"metric", "baseline", "ours", "sem", "n", "command", "seconds"}, "rows": all findings}."""
    summary = {}
    for key, (_, rows) in found.items():
        head, words, seconds = rows[0]
        summary[key] = {
            **{name: getattr(head, name) for name in ("metric", "baseline", "ours", "sem", "n")},
            "command": words,
            "seconds": seconds,
            "rows": [dataclasses.asdict(finding) for finding, _, _ in rows],
        }
    return summary


def tables(found: dict[str, tuple[Figure, list[tuple[Finding, str, int]]]]) -> str:
    """Markdown: a table for each figure."""
    lines = []
    for key, (figure, rows) in found.items():
        lines += [
            f"## {figure.title} ({key})",
            "",
            "| | baseline | ours | difference (95 % interval) | n | |",
            "|---" * 6 + "|",
        ]
        for f, _, _ in rows:
            gain = f"{f.ours - f.baseline:+.3f} ({f.low:+.3f} to {f.high:+.3f})"
            lines.append(f"| {f.title} | {f.baseline:.3f} | {f.ours:.3f} | {gain} | {f.n} | {f.verdict} |")
        lines += ["", *(f"`{words}`" for words in dict.fromkeys(words for _, words, _ in rows)), ""]
    return "\n".join(lines)


def build(cfg: DictConfig, root: Path = Path("experiments/results"), outputs: Path = Path("outputs")) -> Path:
    """Runs what is missing and writes the report; returns the page's path."""
    store = Store(root, outputs, cfg.quick)
    runs = [run for run in RUNS if cfg.only is None or run.name in cfg.only]
    for number, run in enumerate(runs):
        if store.missing(run):
            log.info("%d of %d: %s", number + 1, len(runs), shlex.join(run.command(cfg.quick)))
            if cfg.make:
                store.make(run)
    found = findings(store)
    if not found:
        raise ValueError(f"make: expected runs stored in {store.folder}, found none; make=true makes them")
    summary = summarise(found)
    others = {key: read_json(root / f"{key}.json") for key in OTHERS if (root / f"{key}.json").is_file()}
    write_json(store.folder / "summary.json", summary | others)
    if not cfg.quick:
        write_json(root / "summary.json", summary | others)
    write_text(store.folder / "tables.md", tables(found))
    write_text(store.folder / "report.html", page(store, found, others))
    return store.folder / "report.html"


@command("experiments/report")
def main(cfg: DictConfig) -> None:
    """Writes the report and says where it is."""
    print(build(cfg))


if __name__ == "__main__":
    main()
