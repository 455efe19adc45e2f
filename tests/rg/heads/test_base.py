import math
import subprocess
import sys

import pytest
import torch
from lightning import Callback, Trainer
from torch.utils.data import DataLoader

from rg.backbone.diffusion import DiffusionBackbone
from rg.heads.spatial import SpatialHead

# What `sample_noise` sees: training counts from 0 up, validation from -2 down; -1 has the hash of -2 and is left out.
DRAWS = [*range(30), *range(-1001, -1)]
WIDTHS = {"projection_dim": 16, "norm_groups": 2, "hidden_channels": 8}


class Recording(DiffusionBackbone):
    """A real backbone that keeps what it was asked."""

    def __init__(self, pipeline):
        super().__init__(pipeline)
        self.noises, self.times = [], []
        self.denoiser.time_proj.register_forward_pre_hook(lambda _module, given: self.times.append(given[0]))

    def add_noise(self, latents, noise, timesteps):
        self.noises.append(noise)
        return super().add_noise(latents, noise, timesteps)


@pytest.fixture
def backbone(tiny_pipeline):
    return Recording(tiny_pipeline())


def make_head(backbone, **hyperparameters):
    torch.manual_seed(0)
    own = {"tap_channels": backbone.tap_channels, "time_embed_dim": backbone.time_embed_dim}
    return SpatialHead(**{**own, **WIDTHS, **hyperparameters}).attach_backbone(backbone)


def make_batch(indices, draws, *, side=8):
    latents = [torch.randn(4, side, side, generator=torch.Generator().manual_seed(i)) for i in indices]
    return {
        "label": torch.full((len(indices), 3, 32, 32), -1.0),
        "keypoints": torch.zeros(len(indices), 1, 18, 3),
        "latent_mean": torch.stack(latents),
        "latent_std": torch.full((len(indices), 4, side, side), 0.1),
        "index": torch.tensor(indices),
        "epoch": torch.tensor(draws),
    }


@pytest.mark.parametrize(("convention", "expected"), [("direct", [0, 7, 999]), ("mirrored", [1000, 993, 1])])
def test_time_conventions(backbone, convention, expected):
    head = make_head(backbone, time_convention=convention)
    timesteps = torch.tensor([0, 7, 999])
    assert head.time_index(timesteps).tolist() == expected
    head.readout(*(torch.randn(3, 4, 8, 8) for _ in range(2)), timesteps)
    assert backbone.times[-1].tolist() == expected


def test_a_head_without_time_embeds_none(backbone):
    head = make_head(backbone, time_convention="none")
    assert head.time_index(torch.tensor([5])) is None
    assert head.readout(torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([5])).shape == (1, 3, 8, 8)
    assert len(backbone.times) == 1, "the denoiser's own"


def test_a_draw_does_not_depend_on_the_batch_or_the_global_state(backbone):
    head = make_head(backbone, seed=3)
    together = head.sample_noise(make_batch([5, 6, 7], [0, 1, 2]))
    torch.manual_seed(99)
    for row, (index, seen) in enumerate([(5, 0), (6, 1), (7, 2)]):
        alone = head.sample_noise(make_batch([index], [seen]))
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one[0], many[row])


@pytest.mark.parametrize(("seed", "index", "seen"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_a_draw_depends_on_seed_sample_and_count(backbone, seed, index, seen):
    _, noise, _ = make_head(backbone, seed=0).sample_noise(make_batch([0], [0]))
    _, other, _ = make_head(backbone, seed=seed).sample_noise(make_batch([index], [seen]))
    assert not torch.isclose(noise, other).any()


def test_a_draw_is_the_same_in_every_process():
    """The seed is a hash of integers, which Python does not salt."""
    command = [sys.executable, "-c", "print(hash((3, 12345, 7)))"]
    printed = {subprocess.check_output(command, env={"PYTHONHASHSEED": salt}) for salt in ("1", "2")}
    assert {int(text) for text in printed} == {hash((3, 12345, 7))}
    grid = [(seed, index, seen) for seed in range(5) for index in range(100) for seen in DRAWS]
    assert len({hash(key) for key in grid}) == len(grid)


def test_timesteps_cover_the_whole_range_evenly(backbone):
    _, _, timesteps = make_head(backbone).sample_noise(make_batch(list(range(4000)), [0] * 4000, side=1))
    assert timesteps.min() < 5 and timesteps.max() > 994 and timesteps.max() < 1000
    counts = torch.histc(timesteps.float(), bins=10, min=0, max=1000)
    assert (counts - 400).abs().max() < 5 * math.sqrt(400)


def test_latents_have_the_autoencoders_deviation(backbone):
    batch = make_batch(list(range(500)), [0] * 500)
    latents, noise, _ = make_head(backbone).sample_noise(batch)
    deviation = (latents - batch["latent_mean"]) / 0.1
    for sample in (deviation, noise):
        assert abs(sample.mean()) < 0.02 and abs(sample.std() - 1) < 0.02
    assert abs((deviation * noise).mean()) < 0.02


def test_validation_is_repeatable_and_never_sees_training_noise(backbone):
    head = make_head(backbone, val_timesteps=[0, 1, 500, 999]).eval()
    trained = [head.sample_noise(make_batch([index], [seen]))[1] for index in range(3) for seen in range(30)]
    batch = make_batch([0, 1, 2], [0, 7, 29])
    first = [head.readout_at(batch, t) for t in head.hparams.val_timesteps]
    seen_again = make_batch([0, 1, 2], [0, 0, 0])
    for t, readout in zip(head.hparams.val_timesteps, first, strict=True):
        assert torch.equal(head.readout_at(seen_again, t), readout)
    held_out = torch.cat(backbone.noises[:4])
    distinct = torch.cat([*trained, held_out]).flatten(1)[:, 0]
    assert len(distinct.unique()) == len(trained) + 12


def test_validation_reads_the_mean_latents(backbone):
    head, batch = make_head(backbone), make_batch([0, 1], [0, 0])
    readout = head.readout_at(batch, 300)
    (noise,) = backbone.noises
    assert torch.equal(readout, head.readout(batch["latent_mean"], noise, torch.tensor([300, 300])))
    torch.testing.assert_close(readout[1:], head.readout_at(make_batch([1], [0]), 300))


def test_a_head_for_another_backbone_is_refused(backbone):
    taps, width = backbone.tap_channels, backbone.time_embed_dim
    with pytest.raises(ValueError, match=r"SpatialHead .*channels \[4\].* 6; "):
        make_head(backbone, tap_channels=[4], time_embed_dim=6)
    head = make_head(backbone)
    head.check_taps(tuple(taps), width)
    with pytest.raises(ValueError, match=f"and {width + 1}$"):
        head.check_taps(taps, width + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm_groups": 3}, r"norm_groups: .*4\.0.* 3"),
        (
            {"projection_dim": 10, "norm_groups": 1},
            r"norm_groups: .*2\.5.* 1",
        ),
        ({"time_convention": "backwards"}, r"time_convention: .*'direct'.*'backwards'"),
    ],
)
def test_bad_hyperparameters_are_named(backbone, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_head(backbone, **wrong)


def test_an_unknown_hyperparameter_is_an_error(backbone):
    with pytest.raises(TypeError, match="projection_dims"):
        make_head(backbone, projection_dims=8)


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, head, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_learning_rate_warms_up_and_decays_to_zero(backbone, tmp_path):
    head, rates = make_head(backbone, learning_rate=0.1, warmup_steps=3), Rates()
    batches = DataLoader([make_batch([0], [i]) for i in range(5)], batch_size=None)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    Trainer(max_steps=10, callbacks=[rates], default_root_dir=tmp_path, accelerator="cpu", **quiet).fit(head, batches)
    expected = [0.1 * min(1, (k + 1) / 4) * (1 + math.cos(math.pi * k / 10)) / 2 for k in range(10)]
    assert rates.rates == pytest.approx(expected, rel=1e-5)
    assert head.lr_schedulers().get_last_lr()[0] == pytest.approx(0, abs=1e-8)
