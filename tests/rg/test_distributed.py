"""Training on two ranks: two processes of this machine, joined by gloo, as Lightning's DDP starts them."""

import os
import socket
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback

from rg.heads import load_head
from rg.train import train

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, SAMPLES = 6, 12


class Watch(Callback):
    """Writes what a rank saw and learnt: the indices of every step and the gradients that its optimizer got."""

    def __init__(self, folder, crash_at=None):
        self.folder, self.crash_at = Path(folder), crash_at
        self.indices, self.gradients = {}, {}

    def on_before_optimizer_step(self, trainer, head, optimizer):
        self.gradients[trainer.global_step] = {name: p.grad.clone() for name, p in head.named_parameters()}

    def on_train_batch_end(self, trainer, head, outputs, batch, batch_idx):
        self.indices[trainer.global_step] = batch["index"].tolist()
        if trainer.global_step == self.crash_at:
            raise RuntimeError("power cut")

    def on_train_end(self, trainer, head):
        file = self.folder / f"rank-{trainer.global_rank}-of-{trainer.world_size}.pt"
        torch.save({"indices": self.indices, "gradients": self.gradients}, file)


def run(place, name, *words, crash_at=None):
    """Trains a tiny head on a tiny random pipeline, as rank and ranks of the environment say."""
    torch.set_num_threads(1)
    words = [
        *("+experiment=pose_100", "~logger.wandb", f"run_dir={place / name}", f"data.builder.root={place / 'data'}"),
        *(f"world.backbone.path={place / 'model'}", "world.resolution=32", "world.line_width=1"),
        *("world.projection_dim=16", "world.norm_groups=2", "world.hidden_channels=8", "head.warmup_steps=1"),
        *(f"data.size={SAMPLES}", "data.val_size=4", "data.epoch_batches=4", "data.builder.shard_size=8"),
        *("head.val_timesteps=[300]", "trainer.log_every_n_steps=1", "trainer.check_val_every_n_epoch=1"),
        *(f"trainer.max_steps={STEPS}", "trainer.accelerator=cpu", "+trainer.enable_progress_bar=false", *words),
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", words)
    checkpoints = config.trainer.callbacks[0]
    checkpoints.every_n_train_steps = 3
    watch = {"_target_": f"{__name__}.Watch", "folder": str(place / name), "crash_at": crash_at}
    config.trainer.callbacks = [checkpoints, watch]
    return train(config, place / name)


def run_rank(rank, port, place, name, crash_at):
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ.update(environment | {"LOCAL_RANK": str(rank), "NODE_RANK": "0"})
    two = ["trainer.devices=2", "+trainer.strategy=ddp", "data.batch_size=2"]
    run(place, name, *two, crash_at=crash_at)


def run_ranks(place, name, crash_at=None):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("spawn")
    ranks = [context.Process(target=run_rank, args=(rank, port, place, name, crash_at)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(240)
        process.kill()
    return [process.exitcode for process in ranks]


def seen(place, name, ranks=2):
    return [torch.load(place / name / f"rank-{rank}-of-{ranks}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A tiny pipeline, images, a run of one process with batches of four, and one of two ranks with batches of two."""
    from tests import families

    place = tmp_path_factory.mktemp("distributed")
    families.build("sd15", tokenizer).save_pretrained(place / "model")
    run(place, "alone", "data.batch_size=4")
    assert run_ranks(place, "ranks") == [0, 0]
    return place


def test_ranks_get_the_gradient_of_one_process_with_the_joined_batch(place):
    (alone,), ranks = seen(place, "alone", 1), seen(place, "ranks")
    assert list(alone["gradients"]) == list(range(STEPS))
    for name, expected in alone["gradients"][0].items():
        assert torch.equal(ranks[0]["gradients"][0][name], ranks[1]["gradients"][0][name]), name
        # In float32 on other numbers of images; a sum in place of the mean would be twice as large.
        torch.testing.assert_close(
            ranks[0]["gradients"][0][name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max()
        )
    for step in range(STEPS):
        for name, expected in ranks[0]["gradients"][step].items():
            assert torch.equal(ranks[1]["gradients"][step][name], expected), (step, name)
    one, two = (load_head(place / name / "head").state_dict() for name in ("alone", "ranks"))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=2e-2, atol=2e-4)


def test_ranks_share_every_epochs_samples_without_overlap(place):
    (alone,), (first, second) = seen(place, "alone", 1), seen(place, "ranks")
    for step, indices in alone["indices"].items():
        assert first["indices"][step] + second["indices"][step] == indices
    for begin in (1, 4):  # an epoch over the twelve samples is three steps of two ranks with two each
        mine, others = ([i for step in range(3) for i in rank["indices"][begin + step]] for rank in (first, second))
        assert not set(mine) & set(others) and sorted(mine + others) == list(range(SAMPLES))


def test_resumed_ranks_equal_uninterrupted_ones(place):
    assert all(run_ranks(place, "parts", crash_at=5))
    assert torch.load(place / "parts/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert run_ranks(place, "parts") == [0, 0]
    for whole, rest in zip(seen(place, "ranks"), seen(place, "parts"), strict=True):
        assert rest["indices"] == {step: whole["indices"][step] for step in (4, 5, 6)}
    whole, parts = (load_head(place / name / "head").state_dict() for name in ("ranks", "parts"))
    assert all(torch.equal(parts[name], expected) for name, expected in whole.items())


def test_the_command_starts_its_ranks(place):
    words = ["+experiment=pose_100", "~logger.wandb", "data.size=8", "data.val_size=2", "data.batch_size=2"]
    words += ["data.epoch_batches=2", "data.builder.shard_size=4", "trainer.max_steps=2", "trainer.accelerator=cpu"]
    words += ["trainer.devices=2", "+trainer.strategy=ddp", "trainer.check_val_every_n_epoch=1", "engine.workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "rg.train", *words]
    done = subprocess.run(line, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    latest = place / "outputs/pose_100/latest"
    assert torch.load(latest / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert (latest / "head/head.json").is_file() and (latest / "train_ddp_process_1.log").is_file()
