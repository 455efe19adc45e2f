"""What W&B would be given without a key: two workspaces and a report as JSON."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.report.dashboard import build
from rg.cli import compose_config
from rg.io.files import read_json, write_json

ROOT = Path(__file__).parents[3]


def test_without_a_key_the_serialised_views_are_written(tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="an extra: pip install '.[dashboard]'")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    figure = {"metric": "PCK@0.05", "baseline": 0.04, "ours": 0.7, "sem": 0.02, "n": 32, "command": "python -m x"}
    write_json(tmp_path / "summary.json", {"fig4": figure})
    cfg = compose_config("experiments/dashboard", [f"summary={tmp_path}/summary.json"])
    paths = build(cfg, tmp_path / "views")
    views = {path.stem: read_json(path) for path in paths}
    assert set(views) == {"workspace_training", "workspace_sweep", "report"}
    assert "Figure 4" in str(views["report"]) and "python -m x" in str(views["report"])
    assert "train/loss" in str(views["workspace_training"]) and "c::settings" not in str(views["workspace_training"])


def test_the_sweep_of_wandb_names_settings_of_a_training():
    sweep = OmegaConf.load(ROOT / "conf/sweep/wandb_bayes.yaml")
    words = []
    for name, choice in sweep.parameters.items():
        words.append(f"{name}={choice['values'][0] if 'values' in choice else choice.min}")
    cfg = compose_config("train", [sweep.command[4], *words])
    assert cfg.head.projection_dim == 64 and cfg.head.learning_rate == 0.0003 and sweep.command[3] == "rg.train"
