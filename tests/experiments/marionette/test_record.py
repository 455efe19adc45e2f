import json
import os
from pathlib import Path

import pytest

from experiments.marionette.card.text import training_text
from experiments.marionette.record import Stopwatch, read_seconds, write_note, write_record


def table(folder: Path, losses: list[float], seconds: float | None) -> None:
    folder.mkdir(parents=True)
    rows = "".join(f"{step},{loss}\n" for step, loss in enumerate(losses, 1))
    (folder / "losses.csv").write_text(f"step,loss\n{rows}")
    if seconds is not None:
        (folder / "seconds.txt").write_text(f"{seconds}\n")


def test_a_stopwatch_adds_up(tmp_path: Path) -> None:
    assert read_seconds(tmp_path) == 0
    (tmp_path / "seconds.txt").write_text("60")
    watch = Stopwatch(tmp_path)
    watch.start -= 10  # it began ten seconds ago
    watch.note()
    assert 70 <= read_seconds(tmp_path) < 71
    watch.note()
    assert read_seconds(tmp_path) < 71


def test_each_stage_is_recorded_as_far_as_it_is(tmp_path: Path) -> None:
    table(tmp_path / "autoencoder", [9.0] * 500 + [2.0] * 500 + [1.0] * 500, 120)
    write_note(tmp_path / "autoencoder/quality.json", {"batch_size": 8, "seed": 1}, {"psnr_mean": 33.0})
    table(tmp_path / "unet", [0.5], None)
    table(tmp_path / "detector/abc", [3.0, 2.0], 30)
    write_note(tmp_path / "detector/done.json", {"batch_size": 32}, {})
    table(tmp_path / "pictures/train", [], 60)
    table(tmp_path / "pictures/held_out", [], 1)
    write_record(tmp_path, "python -m x")
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == {
        "command": "python -m x",
        "pictures": {"seconds": 61.0},
        "autoencoder": {
            "seconds": 120.0,
            "steps": 1500,
            "loss": 1.5,
            "batch_size": 8,
            "settings": {"batch_size": 8, "seed": 1},
            "quality": {"psnr_mean": 33.0},
        },
        "unet": {"steps": 1, "loss": 0.5},
        "detector": {
            "seconds": 30.0,
            "steps": 2,
            "loss": 2.5,
            "batch_size": 32,
            "settings": {"batch_size": 32},
        },
    }
    text = "\n".join(training_text(record))  # what the card makes of it
    for part in (
        "python -m x",
        "| pictures | - | - | 1.0 |",
        "| autoencoder | 1,500 | 8 | 2.0 |",
        "| unet | 1 | - | - |",
    ):
        assert part in text, part


def test_an_empty_folder_has_nothing_to_record(tmp_path: Path) -> None:
    write_record(tmp_path, "python -m x")
    assert json.loads((tmp_path / "record.json").read_text()) == {"command": "python -m x"}
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("stage", ["detector", "transformer", "classifier"])
def test_of_several_trainings_the_latest_counts(tmp_path: Path, stage: str) -> None:
    table(tmp_path / stage / "old", [1.0], 10)
    table(tmp_path / stage / "new", [1.0, 1.0], 20)
    os.utime(tmp_path / stage / "old/losses.csv", (1, 1))
    write_record(tmp_path, "")
    assert json.loads((tmp_path / "record.json").read_text())[stage] == {"seconds": 20.0, "steps": 2, "loss": 1.0}
