import csv
from pathlib import Path

import pytest
import torch
import yaml

from experiments.quality.ship import final_scores, ship
from rg.heads import load_head
from rg.heads.spatial import SpatialHead


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was resumed once: two logs, the later one counts."""
    head = SpatialHead(tap_channels=[8], time_embed_dim=6, projection_dim=16, norm_groups=2, val_timesteps=[50, 600])
    head.save_pretrained(tmp_path / "head")
    (tmp_path / ".hydra").mkdir()
    words = ["+experiment=pose_100", "seed=3", "resume=true"]
    (tmp_path / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    config = {"seed": 3, "world": {"name": "marionette"}, "trainer": {"max_steps": 500}}
    config["data"] = {"size": 100, "val_size": 4, "batch_size": 16}
    (tmp_path / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config))
    for version, loss in ((0, 0.9), (1, 0.25)):
        folder = tmp_path / "csv" / f"version_{version}"
        folder.mkdir(parents=True)
        with (folder / "metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["step", "train/loss", "val/loss_t50", "val/loss_t600"])
            writer.writeheader()
            writer.writerow({"step": 1, "train/loss": 0.5})
            writer.writerow({"step": 2, "val/loss_t50": loss, "val/loss_t600": 2 * loss})
    return tmp_path


def test_a_shipped_head_is_the_runs_head_in_half_precision(run_dir: Path, tmp_path: Path):
    folder = ship(run_dir, "small", tmp_path / "models")
    trained, shipped = load_head(run_dir / "head"), load_head(folder)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor.half().float(), shipped.state_dict()[name])
    card = (folder / "README.md").read_text()
    assert "    python -m rg.train +experiment=pose_100 seed=3\n" in card
    assert "| noise level t | 50 | 600 |" in card and "| loss | 0.250 | 0.500 |" in card


def test_a_run_without_validation_is_refused(run_dir: Path, tmp_path: Path):
    for path in run_dir.glob("csv/*/metrics.csv"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="metrics.csv.* none"):
        final_scores(run_dir)
    with pytest.raises(FileNotFoundError):
        ship(run_dir, "small", tmp_path / "models")
    assert not (tmp_path / "models").exists(), "nothing half-written"
