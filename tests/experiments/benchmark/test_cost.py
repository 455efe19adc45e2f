from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.benchmark.cost import check, counted, guided_flop, measured_rate, sampling_cost, sheet, training_cost
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance


def configuration(root: Path, *overrides: str):
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        return compose("cost", list(overrides))


@pytest.fixture(scope="module")
def model(root):
    return counted(configuration(root))


def guidance(**settings):
    return ReadoutGuidance([GuidanceTerm(lambda features, time: features[0])], **settings)


@pytest.mark.slow
def test_counts_of_stable_diffusion(root):
    model = counted(configuration(root, "world=sd15"))
    assert model.unet.parameters == 859_520_964 and model.head.parameters == 8_484_751  # both as published
    assert model.features[0] == (1280, 8, 8) and model.features[-1] == (320, 64, 64)
    assert model.unet.forward == pytest.approx(803e9, rel=0.01)  # 401 G multiply-adds at 512 px
    assert (model.image, model.latent, model.itemsize) == (512, (4, 64, 64), 2)


def test_a_guided_step_is_the_passes_that_it_makes(model):
    forward, backward = model.unet.forward, model.unet.backward + model.head.forward + model.head.backward
    for settings, shared, forwards, backwards in (
        ({"update": "score"}, True, 2, 1),
        ({"update": "score"}, False, 3, 1),
        ({"update": "score", "checkpointing": True}, True, 3, 1),
        ({"update": "adam"}, True, 3, 1),
        ({"update": "score", "branch": "both"}, True, 2, 2),
        ({"update": "adam", "branch": "both"}, True, 4, 2),
    ):
        flop, rows = guided_flop(model, guidance(**settings), shared)
        assert (flop, rows) == (forwards * forward + backwards * backward, backwards), settings


def test_only_guided_steps_pay(root, model):
    cfg = configuration(root, "job=sample", "+experiment=pose_control", "images=3", "sampling.num_inference_steps=10")
    plain, half, whole = (sampling_cost(cfg, model, guidance(stop=stop))["flop"] for stop in (0.0, 0.5, 1.0))
    assert plain == 3 * (10 * 2 * model.unet.forward + model.decode)
    assert half - plain == pytest.approx((whole - plain) / 2)
    assert sampling_cost(cfg, model, instantiate(cfg.guidance)(terms=guidance().terms))["flop"] == whole


def test_training_counts_steps_validations_and_the_making_of_data(root, model):
    sizes = ["data.size=100", "data.val_size=10", "data.batch_size=4", "data.epoch_batches=5"]
    cfg = configuration(root, *sizes, "trainer.max_steps=20", "trainer.check_val_every_n_epoch=2")
    read = model.unet.forward + model.head.forward
    found = training_cost(cfg, model)
    expected = 20 * 4 * (read + model.train) + 2 * 10 * 4 * read + 110 * model.encode
    assert found["flop"] == expected
    # Two images of 64x64 and the latents' mean and standard deviation in half precision.
    assert found["disk"] == 110 * (2 * 3 * 64**2 + 2 * 2 * 4 * 16**2 + 4096) + 16 * model.head.parameters
    lines = "\n".join(sheet(configuration(root, "hardware.memory_gb=0.001"), model, found, 1e9))
    assert f"{expected / 3.6e12:.3g} hours at 1 GFLOP/s" in lines and "does not fit in 0.001 GB" in lines


@pytest.mark.slow
@pytest.mark.parametrize("job", ["train", "sample"])
def test_estimates_are_near_a_measured_run(root, model, job):
    cfg = configuration(root, f"job={job}", "images=4", "data.batch_size=4")
    costs = training_cost(cfg, model) if job == "train" else sampling_cost(cfg, model, guidance())
    rate = measured_rate(model, 4, "cpu", torch.float32)
    for line in check(cfg, costs, rate, "score", "cpu"):
        measured, estimated = (float(line.split(f"{word} ")[1].split(",")[0]) for word in ("measured", "estimated"))
        assert 0.1 < measured / estimated < 10, line
