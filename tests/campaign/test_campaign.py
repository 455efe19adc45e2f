"""A small part of the campaign, and that the watch sees what it is there for."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.campaign import watch
from tests.campaign.cases import run_cases
from tests.campaign.kinds import FILES

NAME = "file.json"


def refuse(text: str) -> None:
    raise ValueError(text)


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda folder: refuse(f"{NAME}: expected a number"), watch.CLEAR),
        (lambda folder: refuse("expected a number"), watch.FOREIGN),
        (lambda folder: refuse(f"{NAME}: expected\na number"), watch.FOREIGN),
        (lambda folder: {}["key"], watch.FOREIGN),
        (lambda folder: bytearray(2 * watch.MEMORY), watch.FOREIGN),
        (lambda folder: 1, watch.EQUAL),
        (lambda folder: 2, watch.DIFFERENT),
        (lambda folder: watch.Report(2, [f"{NAME} is damaged"]), watch.SKIPPED),
        (lambda folder: time.sleep(60), watch.HANG),
        (lambda folder: os.kill(os.getpid(), signal.SIGKILL), watch.KILLED),
        (lambda folder: os.system("true"), watch.PROGRAM),
        (lambda folder: (folder / "inside").write_text(""), watch.DIFFERENT),
        (lambda folder: (folder.parent / "outside").write_text(""), watch.OUTSIDE),
        (lambda folder: (folder / NAME).rename(folder.parent / "outside"), watch.OUTSIDE),
    ],
)
def test_the_watch_tells_outcomes_apart(tmp_path: Path, read, expected):
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / NAME).write_text("{}")
    seconds = 1 if expected == watch.HANG else 20
    outcome = watch.run(lambda: read(folder), folder, [NAME], watch.digest(1), seconds)
    assert outcome.name == expected, outcome.detail


def test_damaged_files_of_every_kind_are_refused_skipped_or_read(tmp_path: Path):
    kinds = {name: kind for name, kind in FILES.items() if name != "pipeline"}
    cases = run_cases(kinds, tmp_path, seed=1, count=40)
    assert not [case for case in cases if case["outcome"] in watch.BAD]
    assert Counter(case["outcome"] for case in cases)[watch.CLEAR] > 15
