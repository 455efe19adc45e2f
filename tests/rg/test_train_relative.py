"""Relative heads from nothing to a head that is measured, by the code behind the commands, at tiny size."""

import csv
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.quality.relative import relative_estimates
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.shards import read_shards
from rg.heads import load_head
from rg.train import train

ROOT = Path(__file__).parents[2]
IMAGES = {"correspondence": 2, "appearance": 4, "identity": 5}
NEGATIVES = {"appearance": ("edited", "rendered"), "identity": ("edited", "lookalike", "stranger")}


@pytest.fixture(
    scope="module",
    params=[*list(IMAGES)[:1], *(pytest.param(name, marks=pytest.mark.slow) for name in list(IMAGES)[1:])],
)
def trained(request, tmp_path_factory):
    """Name and run folder of a run of 3 steps on 4 groups; it finds no data and makes it."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    words = [f"+experiment={name}", "~logger.wandb", f"run_dir={folder}/run", f"data.builder.root={folder}/data"]
    words += ["data.size=4", "data.val_size=3", "data.batch_size=2", "data.epoch_batches=3"]
    words += ["world.projection_dim=16", "world.norm_groups=2", "head.val_timesteps=[50]", "trainer.max_steps=3"]
    words += ["trainer.check_val_every_n_epoch=1", "trainer.accelerator=cpu", "+trainer.enable_progress_bar=false"]
    words += [] if name == "correspondence" else ["data.builder.annotator.num_inference_steps=2"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", words)
    checkpoints, _, *figures = config.trainer.callbacks
    config.trainer.callbacks = [checkpoints, *figures]
    return name, folder, train(config, folder / "run")


def test_the_run_leaves_its_head_images_and_scores(trained):
    name, folder, head = trained
    loaded = load_head(folder / "run/head")
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in head.state_dict().items())
    assert {path.name for path in (folder / "run/images").iterdir()} == {
        "readouts-000003.png",
        "mixing_weights-000003.png",
    }
    rows = [row for file in (folder / "run").rglob("metrics.csv") for row in csv.DictReader(file.open())]
    scores = ["pck@0.05_t50", "pck@0.1_t50"]
    scores = scores if name == "correspondence" else [f"accuracy_{negative}_t50" for negative in NEGATIVES[name]]
    for score in (*scores, "loss_t50"):
        (value,) = (row[f"val/{score}"] for row in rows if row.get(f"val/{score}"))
        assert float(value) >= 0 and (score == "loss_t50" or float(value) <= 1)


def test_what_it_was_trained_on(trained):
    name, folder, _ = trained
    groups = read_shards(folder / "data/train")
    assert len(groups) == 4 and groups.decoded().shape[1:] == (IMAGES[name], 3, 64, 64)
    seen = groups.points[..., 2].all(2).sum(1)
    assert (seen >= 8).all() if name == "correspondence" else not seen.any()


def test_it_is_measured_beside_the_raw_features(trained):
    name, folder, _ = trained
    head = load_head(folder / "run/head").attach_backbone(DiffusionBackbone.from_pretrained("marionette", device="cpu"))
    found = relative_estimates(head, read_shards(folder / "data/val"))
    expected = {"PCK@0.1, t=50", "PCK@0.1, head turned by 20°, t=50"}
    if name != "correspondence":
        negatives = {*NEGATIVES[name], "stranger"}
        scores = ("accuracy", "equal error rate")
        expected = {f"{score}, {negative}, t=50" for score in scores for negative in negatives}
    assert set(found) == expected
    first = found[next(iter(found))]
    assert first.low <= first.ours <= first.high and 0 <= first.ours <= 1 and 0 <= first.baseline <= 1
