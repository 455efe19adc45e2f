"""Runs what is missing and keeps of every run what the page needs: scores of each image, a sheet of small images."""

import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from experiments.report.figures import EVALUATE, Run, folder
from rg.io.files import atomic, read_json, write_json
from rg.io.images import open_image

EXAMPLES = 6  # columns of a sheet


class Store:
    """The folder of stored runs, NAME.json and NAME.png each.

    Args:
        root: where the folders of the full and of the reduced report are.
        outputs: where runs are.
        quick: whether it is the reduced report.
    """

    def __init__(self, root: Path, outputs: Path, quick: bool) -> None:
        self.folder, self.outputs, self.quick = root / folder(quick), outputs, quick

    def get(self, name: str) -> dict[str, Any] | None:
        """What is stored of a run, None where nothing is."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.is_file() else None

    def sheet(self, name: str) -> Image.Image:
        """The small images of a run: a row per method, a column per example."""
        return open_image(self.folder / f"{name}.png")

    def missing(self, run: Run) -> bool:
        """Whether a run has not been made, or with other settings."""
        found = self.get(run.name)
        return found is None or found["command"] != shlex.join(run.command(self.quick))

    def make(self, run: Run) -> None:
        """Runs a command, which goes on where it was stopped, and stores what it found.

        Raises:
            RuntimeError: it failed.
        """
        words = run.command(self.quick)
        part = self.folder / f"{run.name}.part.json"  # seconds that stopped tries have taken
        begin = time.perf_counter() - (read_json(part)["seconds"] if part.is_file() else 0)
        try:
            done = subprocess.run([sys.executable, *words[1:]], check=False)
        finally:
            write_json(part, {"seconds": time.perf_counter() - begin})
        if done.returncode:
            raise RuntimeError(f"{shlex.join(words)}: expected it to succeed, it ended with {done.returncode}")
        place = self.outputs / words[3].removeprefix("name=")
        place = place / "latest" if run.module == EVALUATE else place
        scores, marks = (evaluated if run.module == EVALUATE else compared)(place)
        rows = sheet_rows(place, run.module, scores)
        shown = min(EXAMPLES, *(len(paths) for paths in rows.values()))
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic(self.folder / f"{run.name}.png") as temporary:
            paste({name: paths[:shown] for name, paths in rows.items()}).save(temporary, "PNG")
        write_json(
            self.folder / f"{run.name}.json",
            {
                "command": shlex.join(words),
                "seconds": round(time.perf_counter() - begin),
                "scores": scores,
                "sheet": {"rows": list(rows), "columns": shown},
                "marks": {name: kept[:shown] for name, kept in marks.items()},
            },
        )
        part.unlink()


Scores = dict[str, dict[str, list[float | None]]]


def compared(place: Path) -> tuple[Scores, dict[str, Any]]:
    """Scores and marks that an application has written."""
    results = read_json(place / "results.json")
    return results["scores"], results["marks"]


def evaluated(place: Path) -> tuple[Scores, dict[str, Any]]:
    """Of an evaluation's records: each judge's PCK and OKS, and the poses that the first one sees."""
    records = [read_json(path) for path in sorted((place / "samples").glob("*.json"))]
    scores: Scores = {condition: {} for condition in ("unguided", "guided", "ceiling")}
    for judge in records[0]["judges"]:
        for condition, named in scores.items():
            said = [record["judges"][judge][condition] for record in records]
            for alpha in said[0]["pck"]["target"]:
                named[f"PCK@{alpha}, {judge}"] = [one["pck"]["target"][alpha] for one in said]
            named[f"OKS, {judge}"] = [one["oks"] for one in said]
    first = next(iter(records[0]["judges"]))
    skeletons = {c: [record["judges"][first][c]["points"] for record in records] for c in ("ceiling", "guided")}
    return scores, {f"skeletons {condition}": points for condition, points in skeletons.items()}


def sheet_rows(place: Path, module: str, scores: Mapping[str, Any]) -> dict[str, list[Path]]:
    """Images of every method, in the order of the samples."""
    if module == EVALUATE:
        names = ("ceiling", "readout", "unguided", "guided")
        found = {name: sorted((place / "samples").glob(f"*-{name}.png")) for name in names}
    else:
        found = {name: _first_round(place / name) for name in dict.fromkeys(("reference", *scores))}
    return {name: paths for name, paths in found.items() if paths}


def _first_round(folder_of_method: Path) -> list[Path]:
    """A method's images; of several rounds those of the first."""
    return sorted(path for path in folder_of_method.glob("*.png") if path.stem.partition("-")[2] in ("", "0"))


def paste(rows: Mapping[str, Sequence[Path]]) -> Image.Image:
    """One image of all, each of the size of the first row's."""
    side = open_image(next(iter(rows.values()))[0]).size
    sheet = Image.new("RGB", (side[0] * max(map(len, rows.values())), side[1] * len(rows)))
    for row, paths in enumerate(rows.values()):
        for column, path in enumerate(paths):
            image = open_image(path).convert("RGB").resize(side, Image.Resampling.NEAREST)
            sheet.paste(image, (column * side[0], row * side[1]))
    return sheet
