"""The report from stored runs: numbers by hand, a page that needs nothing else, and what is missing."""

import re
import shlex
import sys
from html.parser import HTMLParser

import pytest
import torch

from experiments.report import build as builder
from experiments.report.figures import FIGURES, RUNS, Row
from experiments.report.store import Store, evaluated, paste
from experiments.report.summary import find
from rg.cli import compose_config
from rg.io.files import read_json, write_json
from rg.io.images import save_image

ROW = Row("pixels", "drags", "distance", "raw", "ours", lower=True, goal=0.5)


def stored(before, after):
    return {"scores": {"raw": {"distance": before}, "ours": {"distance": after}}}


def test_a_finding_is_of_the_images_that_both_have():
    found = find(ROW, stored([8.0, 8.0, None, 8.0], [2.0, 4.0, 1.0, 3.0]))
    assert (found.baseline, found.ours, found.n, found.met) == (8.0, 3.0, 3, True)
    assert found.sem == pytest.approx(3**-0.5) and found.low == pytest.approx(-5 - 4.302653 * 3**-0.5, abs=1e-3)
    assert "missed" in find(ROW, stored([8.0, 8.0], [5.0, 5.0])).verdict
    assert find(ROW, stored([8.0, None], [5.0, 5.0])) is None and find(ROW, {"scores": {"raw": {}}}) is None


def test_without_a_goal_three_standard_errors_count_in_the_right_direction():
    row = Row("share", "drags", "distance", "raw", "ours")
    assert find(row, stored([0.1, 0.2, 0.3], [0.7, 0.9, 0.8])).met
    assert not find(row, stored([0.7, 0.9, 0.8], [0.1, 0.2, 0.3])).met
    assert not find(row, stored([0.1, 0.2, 0.3], [0.7, 0.0, 0.4])).met


def test_every_command_fits_its_configuration_and_every_row_its_run():
    for run in RUNS:
        for quick in (False, True):
            words = run.command(quick)
            config = "evaluate" if run.module == "rg.evaluate" else f"experiments/{run.module.rsplit('.', 1)[1]}"
            cfg = compose_config(config, words[3:])
            assert cfg.split == "test"
            rows = [row for figure in FIGURES for row in figure.rows if row.run == run.name]
            assert rows, f"{run.name} is shown nowhere"
            if run.module != "rg.evaluate":
                kept = {name for name, method in cfg.methods.items() if method is not None}
                assert {name for row in rows for name in (row.baseline, row.ours)} <= kept | {"unguided"}
    assert {row.run for figure in FIGURES for row in figure.rows} == {run.name for run in RUNS}


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag


@pytest.fixture
def made(tmp_path):
    """Drags as if they had been made."""
    run = next(run for run in RUNS if run.name == "drags")
    store = Store(tmp_path / "results", tmp_path / "outputs", True)
    names = ["reference", "unguided", "raw_features", "raw_limb", "ours"]
    metrics = {row.metric for figure in FIGURES for row in figure.rows if row.run == "drags"}
    for name in names:
        for i in range(2):
            save_image(torch.rand(3, 8, 8) * 2 - 1, tmp_path / "made" / name / f"{i:05d}.png")
    store.folder.mkdir(parents=True)
    paste({n: sorted((tmp_path / "made" / n).iterdir()) for n in names}).save(store.folder / "drags.png")
    content = {
        "command": shlex.join(run.command(True)),
        "seconds": 61,
        "scores": {n: {m: [float(i + len(n)) for i in range(3)] for m in metrics} for n in names},
        "sheet": {"rows": names, "columns": 2},
        "marks": {"arrows": [[1, 2, 5, 6]] * 2},
    }
    write_json(store.folder / "drags.json", content)
    return store


def test_the_page_needs_nothing_but_itself(made, tmp_path):
    cfg = compose_config("experiments/report", ["quick=true", "make=false"])
    path = builder.build(cfg, tmp_path / "results", tmp_path / "outputs")
    text, links = path.read_text(encoding="utf-8"), Links()
    links.feed(text)
    assert not links.open and all(link.startswith(("#", "data:image/png;base64,")) for link in links.found)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "reduced report" in text and "missed" in text and text.count("<svg") == 2 * 3 + 2 * 4
    summary = read_json(path.parent / "summary.json")
    assert set(summary) == {"fig2", "fig5"} and summary["fig2"]["command"].startswith("python -m experiments.app")
    assert {"metric", "baseline", "ours", "sem", "n", "command", "seconds"} <= set(summary["fig5"])


def test_what_is_stored_is_not_made_again_and_other_settings_are(made):
    run = next(run for run in RUNS if run.name == "drags")
    assert not made.missing(run)
    assert Store(made.folder.parent, made.outputs, False).missing(run)


def test_a_run_that_fails_is_named(made, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="experiments.applications.drags"):
        made.make(next(run for run in RUNS if run.name == "drags"))
    assert read_json(made.folder / "drags.part.json")["seconds"] > 0, "what it took counts when it goes on"


def test_nothing_stored_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="make=true"):
        builder.build(compose_config("experiments/report", ["make=false"]), tmp_path / "results", tmp_path / "outputs")


def test_an_evaluation_gives_every_judges_scores(tmp_path):
    one = {"pck": {"target": {"0.05": 0.5}}, "oks": None, "points": [[[1, 2]] * 18]}
    record = {"judges": {"hourglass": dict.fromkeys(("unguided", "guided", "ceiling"), one)}}
    write_json(tmp_path / "samples" / "00000.json", record)
    scores, marks = evaluated(tmp_path)
    assert scores["guided"] == {"PCK@0.05, hourglass": [0.5], "OKS, hourglass": [None]}
    assert marks["skeletons guided"] == [[[[1, 2]] * 18]]
