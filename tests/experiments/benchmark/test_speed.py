import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.benchmark.speed import benchmark, lacking_memory, task_results
from experiments.benchmark.workloads import Settings, modes_of

SMALL = [
    "repeats=1",
    "training_steps=1",
    "head_repeats=1",
    *(f"sizes.marionette.{key}=1" for key in ("images", "steps")),
]


def settings(root: Path, tmp_path: Path, *overrides: str):
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        return compose("benchmark", [*SMALL, f"run_dir={tmp_path}", *overrides])


@pytest.mark.slow
def test_everything_is_measured(root: Path, tmp_path: Path):
    modes = "memory_modes=[score,released]"
    results = benchmark(settings(root, tmp_path, "models=[marionette]", "device=cpu", modes), tmp_path, "a command")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["command"] == "a command"
    for task, ours in (("spatial", (2, 1)), ("drag", (2, 1))):
        found = results["marionette"][task]
        assert set(found["seconds_per_step"]) == set(found["counted_per_step"]) == set(modes_of(task))
        passes = {mode: (c["forwards"], c["backwards"]) for mode, c in found["counted_per_step"].items()}
        assert passes["score"] == passes["floor"] == ours and passes["released"] == (12, 4)
        assert passes["plain"] == (2, 0) and passes["adam"] == (3, 1) and passes["score_checkpointing"][1] == 1
        assert found["gflop_over_floor"] > 1 and found["gflop_over_release"] < 1
        assert min(found["peak_mb"].values()) > 0 and 0 < found["memory_over_release"] < 1
    assert results["marionette"]["drag"]["counted_per_step"]["record"]["forwards"] == 2
    training, head = results["marionette"]["training"], results["marionette"]["head"]
    assert training["cached"] > 0 and training["encoding"] > 0
    assert head["largest_difference"] < 1e-4 and head["projected_first"] > 0


def test_a_drags_speed_counts_the_references_run():
    times = {"plain": 2.0, "floor": 3.0}
    runs = {("", mode): seconds for mode, seconds in times.items()}
    for task, modes in (("spatial", ("score",)), ("drag", ("score", "record"))):
        runs |= {(task, mode): {"score": 3.6, "record": 2.4}[mode] for mode in modes} | {(task, "released"): 18.0}
    counts = {run: {"gflop": 1.0} for run in runs}
    peaks = {("spatial", "score"): 10.0, ("spatial", "released"): 40.0, ("", "plain"): 5.0}
    found = task_results("spatial", runs, counts, peaks)
    assert found["speedup_over_release"] == 5 and found["memory_over_release"] == 0.25
    assert found["over_floor"] == pytest.approx(1.2) and found["peak_mb"] == {"score": 10, "released": 40, "plain": 5}
    drag = task_results("drag", runs, counts, peaks)
    assert drag["speedup_over_release"] == 3 and "memory_over_release" not in drag


def test_a_model_that_does_not_fit_is_left_out(root: Path, tmp_path: Path, capsys):
    given = Settings("sdxl", 16, "float32", 1, 1, 0, "cpu")
    assert "GB of free memory, found" in lacking_memory(given, margin=2**60)
    results = benchmark(settings(root, tmp_path, "models=[sdxl]", "device=cpu"), tmp_path, "a command", margin=2**60)
    assert "sdxl" not in results and "sdxl: left out: expected" in capsys.readouterr().out
    assert lacking_memory(Settings("marionette", 16, "float32", 1, 1, 0, "cpu")) is None


def test_a_model_without_a_size_is_named(root: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"models: expected some of \['marionette', 'sd15', 'sdxl'\], got \['sd9'\]"):
        benchmark(settings(root, tmp_path, "models=[sd9]"), tmp_path, "a command")
    with torch.device("meta"):
        assert torch.zeros(1).is_meta  # the failed command leaves no state behind
