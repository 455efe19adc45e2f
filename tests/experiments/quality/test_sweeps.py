import csv
import json
from pathlib import Path

import pytest
import yaml

from experiments.quality.sweeps import evaluation_table, training_table


@pytest.fixture
def sweep(tmp_path):
    """Two runs of one setting, one of another, one that is not finished, and the link to the latest."""
    runs = [(["a=1", "seed=0"], 0.2), (["a=1", "seed=1"], 0.4), (["a=2", "seed=0"], 0.9), (["a=3", "seed=0"], 0.0)]
    for number, (words, score) in enumerate(runs):
        folder = tmp_path / f"2026-{number}"
        for name in (".hydra", "csv/version_0", *(["head"] if score else [])):
            (folder / name).mkdir(parents=True)
        (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(["+sweep=a", *words]))
        if score:
            (folder / "head/head.json").write_text("{}")
        with (folder / "csv/version_0/metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["step", "val/loss_t50", "val/pck@0.1_t600", "val/pck@0.1_t50"])
            writer.writeheader()
            writer.writerow({"step": 4, "val/pck@0.1_t50": 0.01, "val/pck@0.1_t600": 0.01, "val/loss_t50": 3})
            writer.writerow({"step": 9, "val/pck@0.1_t50": score, "val/pck@0.1_t600": score / 2, "val/loss_t50": 2})
    (tmp_path / "latest").symlink_to("2026-2")
    return tmp_path


def test_seeds_are_averaged_with_their_interval(sweep):
    lines = training_table(sweep).splitlines()
    assert lines[0] == "| pck@0.1 | t = 50 | t = 600 | mean | seeds |"
    # Two runs: mean 0.3, standard error 0.1, and Student's t of one degree of freedom is 12.706.
    assert lines[2] == "| a=1 | 0.300 ± 1.271 | 0.150 ± 0.635 | 0.225 ± 0.953 | 2 |"
    assert lines[3] == "| a=2 | 0.900 | 0.450 | 0.675 | 1 |"
    assert len(lines) == 4


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="head/head.json.* none"):
        training_table(tmp_path)


def add_run(folder: Path, overrides: list[str], guided: float) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    row = {name: {"mean": mean} for name, mean in (("unguided", 0.1), ("guided", guided), ("ceiling", 0.9))}
    confidence = {name: {"mean": 0.5} for name in row}
    judges = {"a": {"pck": {"0.1": row}, "confidence": confidence}}
    judges["b"] = {"pck": {"0.1": {**row, "guided": {"mean": 0.3}}}, "confidence": confidence}
    (folder / "results.json").write_text(json.dumps({"judges": judges, "images": 32}))


def test_runs_come_best_first_without_what_they_share(tmp_path: Path):
    for scale, guided in ((1, 0.2), (2, 0.8), (3, 0.5)):
        overrides = ["+sweep=guidance", "sampling.eta=1.0", f"guidance.readout_scale={scale}"]
        add_run(tmp_path / f"run-{scale}", overrides, guided)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "latest").symlink_to("run-1")
    lines = evaluation_table(tmp_path).splitlines()
    assert lines[0] == "In common: sampling.eta=1.0"
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| guidance.readout_scale=2",
        "| guidance.readout_scale=3",
        "| guidance.readout_scale=1",
        "| unguided",
        "| ceiling",
    ]
    assert lines[2] == "| settings | PCK@0.1 (a) | confidence (a) | PCK@0.1 (b) | confidence (b) | images |"
    assert lines[4].endswith("| 0.800 | 0.500 | 0.300 | 0.500 | 32 |")


def test_damaged_results_are_one_line(tmp_path: Path):
    add_run(tmp_path / "run-1", [], 0.2)
    path = tmp_path / "run-1" / "results.json"
    path.write_text(path.read_text().replace("32", "null"))
    with pytest.raises(ValueError, match=rf"^{path}: images: .*found None"):
        evaluation_table(tmp_path)


def test_no_finished_evaluation_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        evaluation_table(tmp_path)


def test_damaged_or_different_runs_are_named(sweep: Path):
    add_run(sweep / "a", [], 0.2)
    words = sweep / "a" / ".hydra" / "overrides.yaml"
    for damaged in ("[1", "3", "\0"):
        words.write_text(damaged)
        with pytest.raises(ValueError, match=rf"^{words}: "):
            evaluation_table(sweep)
    add_run(sweep / "b", [], 0.2)
    results = sweep / "b" / "results.json"
    results.write_text(results.read_text().replace('"0.1": {', '"0.2": {'))
    words.write_text("[]")
    with pytest.raises(ValueError, match=rf"{results}: judges: .*0\.1.*0\.2"):
        evaluation_table(sweep)
    log = sweep / "2026-0" / "csv/version_0/metrics.csv"
    log.write_text("step,val/pck@0.1_t50\n1,x\n")
    with pytest.raises(ValueError, match=rf"^{log}: .*'x'"):
        training_table(sweep)
    log.write_text("step,val/pck@0.1_t50\n1,0.5\n")
    with pytest.raises(ValueError, match=r"2026-1: .*t600"):
        training_table(sweep)
