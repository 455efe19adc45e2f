"""What the training took and found, stage by stage: record.json in the work folder, which the model card reads."""

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rg.io.files import atomic, read_json, write_json, write_text
from rg.io.records import Record, validate

# Stages that are trained, and the file in a stage's folder that says under which settings it was finished.
NOTES = {"autoencoder": "quality.json", **dict.fromkeys(("unet", "detector", "transformer", "classifier"), "done.json")}
LAST = 1000  # steps whose mean loss is noted


def read_seconds(folder: Path) -> float:
    """What the file `seconds.txt` of a folder says, 0 without it."""
    path = folder / "seconds.txt"
    return float(path.read_text(encoding="utf-8")) if path.is_file() else 0.0


class Stopwatch:
    """Seconds of work in a folder, summed over the calls that did it, in its file `seconds.txt`.

    The file is one number: where the time is known from elsewhere only, write it there by hand.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.start = folder, time.monotonic()

    def note(self) -> None:
        """Adds the time since the start, or since the last note."""
        now = time.monotonic()
        write_text(self.folder / "seconds.txt", f"{read_seconds(self.folder) + now - self.start:.3f}\n")
        self.start = now


def stage_record(folder: Path, note: str) -> dict[str, Any]:
    """Of a stage in a folder: seconds, steps, loss (mean of the last 1000 steps), when done settings, and quality.

    Nothing if it has not begun; a time that nobody noted is left out.
    """
    tables = sorted(folder.rglob("losses.csv"), key=lambda path: path.stat().st_mtime)
    if not tables:
        return {}
    losses = np.loadtxt(tables[-1], delimiter=",", skiprows=1, usecols=1, ndmin=1)
    seconds = read_seconds(tables[-1].parent)
    found: dict[str, Any] = {"seconds": seconds} if seconds else {}
    found |= {"steps": len(losses), "loss": float(losses[-LAST:].mean())}
    if (folder / note).is_file():
        settings = read_settings(folder / note)
        quality = {key: value for key, value in read_json(folder / note, constants=True).items() if key != "settings"}
        found |= {"batch_size": settings["batch_size"], "settings": settings}
        found |= {"quality": quality} if quality else {}
    return found


def write_record(folder: Path, command: str) -> None:
    """Writes folder/record.json: the command, the seconds of rendering, and a `stage_record` of each stage so far."""
    rendering = sum(read_seconds(images) for images in (folder / "pictures").glob("*"))
    stages = {"pictures": {"seconds": rendering} if rendering else {}}
    stages |= {stage: stage_record(folder / stage, note) for stage, note in NOTES.items()}
    write_json(folder / "record.json", {"command": command, **{name: found for name, found in stages.items() if found}})


# What a call did for a stage.
Outcome = Literal["done before", "done", "not done yet"]


def save(path: Path, state: Any) -> None:
    """Writes tensors and plain values for torch.load with weights_only=True."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


class Note(Record):
    """What `write_note` writes, beside what was measured."""

    settings: dict[str, Any]


def write_note(path: Path, settings: dict[str, Any], found: dict[str, float]) -> None:
    """Says in JSON that a stage is done, under which settings, and what was measured."""
    write_json(path, {"settings": settings, **found})


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings under which `write_note` has written path; None where it has not."""
    return validate(Note, read_json(path, constants=True), str(path)).settings if path.is_file() else None


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether `write_note` has written path under these settings."""
    return read_settings(path) == settings
