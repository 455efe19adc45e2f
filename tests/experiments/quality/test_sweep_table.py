import json
from pathlib import Path

import pytest
import yaml

from experiments.quality.sweeps import sweep_table


def add_run(folder: Path, overrides: list[str], guided: float) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    row = {name: {"mean": mean} for name, mean in (("unguided", 0.1), ("guided", guided), ("ceiling", 0.9))}
    confidence = {name: {"mean": 0.5} for name in row}
    (folder / "results.json").write_text(json.dumps({"pck": {"0.1": row}, "confidence": confidence, "images": 32}))


def test_runs_come_best_first_without_what_they_share(tmp_path: Path):
    for scale, guided in ((1, 0.2), (2, 0.8), (3, 0.5)):
        overrides = ["+sweep=guidance", "sampling.eta=1.0", f"guidance.readout_scale={scale}"]
        add_run(tmp_path / f"run-{scale}", overrides, guided)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "latest").symlink_to("run-1")
    lines = sweep_table(tmp_path).splitlines()
    assert lines[0] == "In common: sampling.eta=1.0"
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| guidance.readout_scale=2",
        "| guidance.readout_scale=3",
        "| guidance.readout_scale=1",
        "| unguided",
        "| ceiling",
    ]


def test_no_finished_run_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        sweep_table(tmp_path)
