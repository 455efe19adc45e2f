import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.benchmark import MODES, benchmark


@pytest.mark.slow
def test_everything_is_measured(root: Path, tmp_path: Path):
    small = ["images=2", "steps=2", "repeats=1", "training_steps=1", f"run_dir={tmp_path}"]
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        results = benchmark(compose("benchmark", small), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["marionette"] == results
    assert set(results["seconds_per_step"]) == set(results["peak_mb"]) == set(MODES)
    assert results["ratio_to_plain"]["plain"] == 1 and min(results["peak_mb"].values()) > 0
    assert results["training"]["steps_per_second"] > 0
