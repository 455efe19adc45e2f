import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, InstantiationException
from lightning import Callback

from experiments.quality.ship import ship
from rg.backbone.diffusion import DiffusionBackbone
from rg.heads import load_head
from rg.train import train

ROOT = Path(__file__).parents[2]
LEVELS = (50, 600)


class Crash(Callback):
    """Ends a run once it has made `step` steps, before the checkpoint of that step is written."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, head, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power cut")


def run(data, run_dir, *overrides, experiment="pose_100", checkpoint_every=3, crash_at=None):
    """Trains a tiny head on 12 images: 6 steps of 4 images, epochs of 4 steps."""
    words = [f"+experiment={experiment}", "~logger.wandb", f"run_dir={run_dir}", f"data.builder.root={data}"]
    words += [
        "data.size=12",
        "data.val_size=4",
        "data.batch_size=4",
        "data.epoch_batches=4",
        "data.builder.shard_size=8",
    ]
    words += ["world.projection_dim=16", "world.norm_groups=2", "world.hidden_channels=8", "head.warmup_steps=1"]
    words += [f"head.val_timesteps={list(LEVELS)}", "trainer.max_steps=6", "trainer.log_every_n_steps=1"]
    words += ["trainer.check_val_every_n_epoch=1", "trainer.accelerator=cpu", "+trainer.enable_progress_bar=false"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", [*words, *overrides])
    checkpoints, _, *figures = config.trainer.callbacks
    checkpoints.every_n_train_steps = checkpoint_every
    config.trainer.callbacks = [checkpoints, *figures]
    if crash_at:
        config.trainer.callbacks.append({"_target_": f"{__name__}.Crash", "step": crash_at})
    return train(config, run_dir)


def logged(run_dir, column):
    """Step -> value of one column, over every CSV file of a run."""
    files = sorted(run_dir.rglob("metrics.csv"))
    rows = [row for file in files for row in csv.DictReader(file.open())]
    return {int(row["step"]): row[column] for row in rows if row.get(column)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    """A run of six steps; it finds no data and makes it."""
    assert not (folder / "data").exists()
    return run(folder / "data", folder / "whole")


def test_missing_images_are_made(folder, uninterrupted):
    made = {path.name for path in (folder / "data").rglob("*.tar")}
    assert {path.name for path in (folder / "data").iterdir()} == {"train", "val"} and made


def test_a_run_leaves_a_head_that_works(folder, uninterrupted):
    head = load_head(folder / "whole" / "head")
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(head.state_dict()[name], tensor), name
    backbone = DiffusionBackbone.from_pretrained("marionette")
    assert head.labelled_by == "ExactPose"
    readout = head.attach_backbone(backbone).readout(*torch.randn(2, 1, 4, 16, 16), torch.tensor([300]))
    assert readout.shape == (1, 18, 32, 32) and readout.isfinite().all()
    assert (folder / "latest").resolve() == folder / "whole"


def test_a_checkpoint_is_small_and_safe_to_load(folder, uninterrupted):
    saved = torch.load(folder / "whole/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 6
    assert set(saved["state_dict"]) == set(uninterrupted.state_dict())
    assert {path.name for path in (folder / "whole/checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_validation_is_logged_for_every_noise_level(folder, uninterrupted):
    for level in LEVELS:
        for column in (f"val/loss_t{level}", f"val/pck@0.05_t{level}", f"val/pck@0.1_t{level}"):
            values = logged(folder / "whole", column)
            assert list(values) == [3, 6], column  # after the only whole epoch, of four steps, and at the end
            assert all(0 <= float(value) < 2 for value in values.values())
        losses = logged(folder / "whole", f"val/loss_t{level}")
        assert losses[3] != losses[6]
    figures = {f"{name}-{step:06d}.png" for name in ("readouts", "mixing_weights") for step in (4, 6)}
    assert {path.name for path in (folder / "whole/images").iterdir()} == figures


@pytest.mark.parametrize(
    ("checkpoint_every", "calls"),
    [pytest.param(3, 1, id="middle-of-epoch"), pytest.param(4, 2, id="end-of-epoch", marks=pytest.mark.slow)],
)
def test_resumed_equals_uninterrupted(folder, uninterrupted, checkpoint_every, calls):
    parts = folder / f"parts-{checkpoint_every}"
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder / "data", parts, checkpoint_every=checkpoint_every, crash_at=5)
    assert not (parts / "head").exists()
    saved = torch.load(parts / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == checkpoint_every
    for _ in range(calls):  # the second time there is nothing left to do, and nothing changes
        resumed = run(folder / "data", parts, checkpoint_every=checkpoint_every)
        for name, tensor in uninterrupted.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name
        for column in ("train/loss", *(f"val/loss_t{level}" for level in LEVELS)):
            assert logged(parts, column) == logged(folder / "whole", column), column
    assert list(logged(folder / "whole", "train/loss")) == [0, 1, 2, 3, 4, 5]
    assert list(logged(parts / "csv/version_1", "train/loss")) == list(range(checkpoint_every, 6))


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_one_interval(folder, uninterrupted, caplog):
    parts = folder / "damaged"
    with pytest.raises(RuntimeError, match="power cut"):
        run(folder / "data", parts, checkpoint_every=2, crash_at=5)
    last = parts / "checkpoints/last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    resumed = run(folder / "data", parts, checkpoint_every=2)
    (line,) = (
        record.message for record in caplog.records if record.levelname == "WARNING" and "ckpt" in record.message
    )
    assert f"{last}: " in line and "previous.ckpt" in line and "\n" not in line
    assert list(logged(parts / "csv/version_1", "train/loss")) == [2, 3, 4, 5]
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for path in (parts / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.ckpt: .*previous\.ckpt: "):
        run(folder / "data", parts)


def test_another_seed_is_another_run(folder, uninterrupted):
    other = run(folder / "data", folder / "other", "seed=1", "trainer.max_steps=1")
    assert logged(folder / "other", "train/loss")[0] != logged(folder / "whole", "train/loss")[0]
    assert other.hparams.seed == 1


@pytest.mark.parametrize(
    ("experiment", "scores"),
    [("depth", {"si_log": 5.0, "delta1.25": 1.0}), pytest.param("edge", {"f@1px": 1.0}, marks=pytest.mark.slow)],
)
def test_depth_and_edges_are_trained_and_scored(folder, experiment, scores):
    words = [f"data.builder.root={folder / experiment}", "trainer.max_steps=4"]
    head = run(folder / "data", folder / f"{experiment}_run", *words, experiment=experiment)
    for level in LEVELS:
        for name, most in scores.items():
            (value,) = logged(folder / f"{experiment}_run", f"val/{name}_t{level}").values()
            assert 0 <= float(value) <= most
    shipped = ship(with_hydras_files(folder / f"{experiment}_run", experiment), experiment, folder / "models")
    card = (shipped / "README.md").read_text()
    assert all(f"| {name} | 0." in card or f"| {name} | 1." in card for name in scores), card
    assert load_head(shipped).hparams == head.hparams


def with_hydras_files(run_dir, experiment):
    """What the command itself leaves beside a run."""
    config = {"seed": 0, "world": {"name": "marionette"}, "trainer": {"max_steps": 4}}
    config["data"] = {"size": 12, "val_size": 4, "batch_size": 4}
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra/config.yaml").write_text(yaml.safe_dump(config))
    (run_dir / ".hydra/overrides.yaml").write_text(yaml.safe_dump([f"+experiment={experiment}"]))
    return run_dir


def test_bad_settings_end_a_run_before_any_work(folder):
    with pytest.raises(InstantiationException, match="norm_groups: .*divisor.* = .* got "):
        run(folder / "unused", folder / "none", "world.norm_groups=3")
    with pytest.raises(InstantiationException, match="at least 1.* 0.*size="):
        run(folder / "unused", folder / "none", "data.size=0")
    assert not (folder / "unused").exists() and not (folder / "none").exists()


@pytest.mark.parametrize(
    ("word", "named"), [("+experiment=nothing", "experiment/nothing"), ("data.sizes=3", "data.sizes")]
)
def test_unknown_names_are_named(folder, word, named):
    with pytest.raises(HydraException, match=named):
        run(folder / "unused", folder / "none", word)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["+experiment=pose_100", "world.norm_groups=3"], "error: norm_groups: expected a divisor of projection_dim"),
        (["+experiment=pose_100", "data.size=0"], "error: data.size: expected "),
    ],
)
def test_bad_input_ends_the_command_with_one_line(tmp_path, words, last):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HYDRA_FULL_ERROR": "0"}
    line = [sys.executable, "-m", "rg.train", f"hydra.run.dir={tmp_path}/run", *words]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(last), done.stderr
    assert "Traceback" not in done.stderr
