import logging
import os
import random
from pathlib import Path

import pytest

from rg.io.folders import natural_key, printable, walk


def names(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in walk(folder, (".png",))]


def make(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def test_numbers_are_sorted_by_their_value() -> None:
    frames = [f"a/frame{i}.png" for i in (0, 1, 2, 9, 10, 11, 100)]
    assert sorted(random.Random(0).sample(frames, len(frames)), key=natural_key) == frames
    assert sorted(["1", "01", "001"], key=natural_key) == sorted(["1", "01", "001"]), "equal values have an order"


def test_names_whose_numbers_have_one_length_are_sorted_as_text() -> None:
    """So that no folder whose names sorted well gets another order."""
    rng = random.Random(0)
    marks = ("-", "_", " ", "/", ".", "a", "Z", "ü", "~", "(")
    found = [
        f"{rng.choice(marks)}{rng.randrange(1000):03}{rng.choice(marks)}{rng.randrange(10)}.png" for _ in range(500)
    ]
    found += ["b.jpeg", "b/c.jpg", "b", "a.webp", "a-b.png", "a100.png", "a.png"]
    assert sorted(found, key=natural_key) == sorted(found)


def test_what_systems_leave_is_left_out(tmp_path: Path) -> None:
    junk = (
        "._p0.png",
        ".ipynb_checkpoints/p0-checkpoint.png",
        "__MACOSX/p0.png",
        "sub/__MACOSX/._p1.png",
        "@eaDir/p.png",
    )
    make(tmp_path, *junk, "p0.PNG", "sub/p1.png", "notes.md")
    assert names(tmp_path) == ["p0.PNG", "sub/p1.png"]


def test_links_are_followed_and_loops_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere = make(tmp_path / "elsewhere", "x.png", "deep/y.png")
    folder = make(tmp_path / "data", "b/z.png")
    (folder / "a").symlink_to(elsewhere)
    (folder / "w.png").symlink_to(elsewhere / "x.png")
    with caplog.at_level(logging.WARNING):
        assert names(folder) == ["a/deep/y.png", "a/x.png", "b/z.png", "w.png"]
        assert not caplog.records
        (folder / "b" / "up").symlink_to(folder)
        (elsewhere / "deep" / "up").symlink_to(elsewhere)
        (folder / "0").symlink_to(folder / "b")  # a folder is read by the path that has no link
        (folder / "gone.png").symlink_to(folder / "nowhere.png")
        (folder / "self.png").symlink_to(folder / "self.png")
        assert names(folder) == ["a/deep/y.png", "a/x.png", "b/z.png", "w.png"]
    assert sorted(record.args[0].relative_to(folder).as_posix() for record in caplog.records) == [
        "0",
        "a/deep/up",
        "b/up",
        "gone.png",
        "self.png",
    ]


def test_only_regular_files_are_given(tmp_path: Path) -> None:
    make(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "null.png").symlink_to("/dev/null")
    assert names(tmp_path) == ["a.png"]


def test_a_name_that_is_no_text_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xff.png")).touch()
    (name,) = names(tmp_path)
    assert printable(name) == "\ufffd.png" and printable("ü 1.png") == "ü 1.png"
