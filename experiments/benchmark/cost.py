"""What a job takes, before it starts: python -m experiments.benchmark.cost job=train +experiment=pose_100 world=sdxl

Operations are counted on models without weights, two per multiply-add of matrix products, convolutions and attention.
The time is an estimate from them, no better than `hardware.gflops` fits such layers: normalisation and memory traffic
are in no count, and weigh most in small models. `check=true` prints it beside a measured run of the embedded model.
Memory is weights, optimizer, data, and what is kept for the backward pass (less with checkpointing); the working memory
of kernels and libraries comes on top. Disk is an upper bound: images are taken as uncompressed.
"""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from experiments.benchmark.architectures import UNETS
from experiments.benchmark.counting import Counted, count
from experiments.benchmark.speed import peak_memory
from experiments.benchmark.workloads import Bench, Settings, clock, per_call, training_speed
from rg.backbone.loading import PRECISIONS
from rg.cli import command
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.heads.base import ReadoutHead

JOBS = ("train", "sample")
CPU_ELEMENTS = 2**20  # of the features that a CPU's speed is measured on


def counted(cfg: DictConfig) -> Counted:
    """The parts of `cfg.world` and of `cfg.head`, counted; what only names a trained head is left out."""
    settings = {key: value for key, value in OmegaConf.to_container(cfg.head, resolve=True).items() if key != "path"}

    def make_head(**widths: Any) -> ReadoutHead:
        return instantiate(settings, **widths, _convert_="all")

    return count(cfg.world.name, PRECISIONS[cfg.world.backbone.get("precision", "float32")], make_head)


def guided_flop(model: Counted, guidance: ReadoutGuidance, shared: bool) -> tuple[int, int]:
    """FLOP per image of a guided step, and rows that are differentiated (see rg/guidance/step.py).

    Args:
        shared: the pipeline's unconditional half holds the head's own condition.
    """
    rows = 2 if guidance.branch == "both" else 1
    moves = guidance.rule.moves
    again = 2 if moves in ("input", "features") or not shared else 2 - rows
    differentiated = 0 if moves == "features" else rows
    forwards = rows + again + (differentiated if guidance.checkpointing else 0)
    heads = model.head.forward + model.head.backward
    return forwards * model.unet.forward + differentiated * model.unet.backward + rows * heads, differentiated


def weights_bytes(model: Counted) -> int:
    """Bytes of U-Net, text encoders, autoencoder and head in memory."""
    return (model.unet.parameters + model.text_parameters) * model.itemsize + 4 * (
        model.autoencoder_parameters + model.head.parameters
    )


def sampling_cost(cfg: DictConfig, model: Counted, guidance: ReadoutGuidance) -> dict[str, float]:
    """Of one batch of `cfg.images` images: FLOP, FLOP of a guided step, bytes of memory and disk."""
    total, images = cfg.sampling.num_inference_steps, cfg.images
    guided = sum(guidance.start * total <= step < guidance.stop * total for step in range(total))
    # SDXL's pipelines take zeros for an absent negative prompt, and heads read under the empty one.
    shared = guidance.branch != "uncond" or cfg.world.family != "sdxl"
    step, rows = guided_flop(model, guidance, shared)
    read = -(-guided // guidance.every)  # in between the gradient is held
    flop = images * (read * step + (total - read) * 2 * model.unet.forward + model.decode)
    kept = images * rows * (model.unet.kept + model.head.kept)
    return {
        "flop": flop,
        "flop_per_step": images * step,
        "memory": weights_bytes(model) + kept,
        "kept": kept,
        "disk": images * 3 * model.image**2,
    }


def training_cost(cfg: DictConfig, model: Counted) -> dict[str, float]:
    """Of the whole training with its validations, and of making the data: FLOP, FLOP of a step, bytes."""
    steps, batch, images = cfg.trainer.max_steps, cfg.data.batch_size, (cfg.data.size or 0, cfg.data.val_size or 0)
    read = model.unet.forward + model.head.forward
    validations = steps // (cfg.trainer.check_val_every_n_epoch * cfg.data.epoch_batches)
    held_out = validations * images[1] * len(cfg.head.val_timesteps) * read
    channels, height, width = model.latent
    sample = 2 * 3 * model.image**2 + 2 * 2 * channels * height * width
    features = sum(4 * c * h * w for c, h, w in model.features)
    kept = batch * (model.head.kept + features)
    return {
        "flop": steps * batch * (read + model.train) + held_out + sum(images) * model.encode,
        "flop_per_step": batch * (read + model.train),
        # Gradients and AdamW's two moments of the head.
        "memory": weights_bytes(model) + 12 * model.head.parameters + kept + sum(images) * sample,
        "kept": kept,
        "disk": sum(images) * (sample + 4096) + (12 + 4) * model.head.parameters,
    }


@torch.no_grad()
def measured_rate(model: Counted, batch: int, device: str, dtype: torch.dtype) -> float:
    """FLOP/s of this machine on the 3x3 convolutions of the model's taps, a batch of rows, in a few seconds.

    Of a CPU, which emulates half precision at a hundredth of its speed, in float32 and on one row of large features.
    """
    flop, seconds = 0, 0.0
    if device == "cpu":
        dtype = torch.float32
        batch = min(batch, max(1, CPU_ELEMENTS // max(c * h * w for c, h, w in model.features)))
    for channels, height, width in sorted(set(model.features)):
        layer = nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype)
        x = torch.randn(batch, channels, height, width, device=device, dtype=dtype)
        flop += 2 * 9 * channels**2 * height * width * batch
        seconds += per_call(lambda _, layer=layer, x=x: layer(x), 3, torch.device(device))
    return flop / seconds


def check(cfg: DictConfig, cost: dict[str, float], rate: float, update: str, device: str) -> list[str]:
    """Runs a few steps of the job on the embedded model, and says what was measured and what was estimated."""
    batch = cfg.images if cfg.job == "sample" else cfg.data.batch_size
    settings = Settings("marionette", 16, "float32", batch, 3, cfg.seed, device)
    bench, estimated = Bench(settings), cost["flop_per_step"] / rate
    if cfg.job == "train":
        measured = batch / training_speed(bench, batch_size=batch, steps=5)["cached"]
        return [f"seconds per step: measured {measured:.3f}, estimated {estimated:.3f}"]
    bench.run(update, "spatial")
    begin = clock(bench.backbone.device)
    bench.run(update, "spatial")
    measured, peak = (clock(bench.backbone.device) - begin) / 3, peak_memory(settings, ("spatial", update))
    return [
        f"seconds per guided step: measured {measured:.3f}, estimated {estimated:.3f}",
        f"MB beside the weights: measured {peak:.0f}, estimated {cost['kept'] / 2**20:.0f}",
    ]


@command("cost")
def main(cfg: DictConfig) -> None:
    """Prints the sheet."""
    if cfg.job not in JOBS:
        raise ValueError(f"job: expected one of {JOBS}, got {cfg.job!r}")
    if cfg.check and cfg.world.name in UNETS:
        raise ValueError(f"check: expected world=marionette, the one whose weights are here, got {cfg.world.name}")
    model, device = counted(cfg), "cuda" if torch.cuda.is_available() else "cpu"
    guidance = instantiate(cfg.guidance)(terms=[GuidanceTerm(lambda features, time: features[0])])
    cost = training_cost(cfg, model) if cfg.job == "train" else sampling_cost(cfg, model, guidance)
    batch = cfg.data.batch_size if cfg.job == "train" else cfg.images
    dtype = PRECISIONS[cfg.world.backbone.get("precision", "float32")]
    given = cfg.hardware.gflops
    rate = given * 1e9 if given else measured_rate(model, batch, device, dtype)
    print("\n".join(sheet(cfg, model, cost, rate)))
    if cfg.check:
        print("\n".join(check(cfg, cost, rate, guidance.update, device)))


def sheet(cfg: DictConfig, model: Counted, cost: dict[str, float], rate: float) -> list[str]:
    """The lines that the command prints."""
    memory, limit = cost["memory"] / 2**30, cfg.hardware.memory_gb
    fits = "" if limit is None else f", {'fits' if memory <= limit else 'does not fit'} in {limit} GB"
    return [
        f"parameters        U-Net {model.unet.parameters:,}, head {model.head.parameters:,}",
        f"GFLOP per step    {cost['flop_per_step'] / 1e9:,.1f}",
        f"GFLOP in all      {cost['flop'] / 1e9:,.0f}",
        f"memory            {memory:.2f} GB, of them {cost['kept'] / 2**30:.2f} kept for the backward pass{fits}",
        f"disk              at most {cost['disk'] / 2**30:.3g} GB",
        f"time              {cost['flop'] / rate / 3600:.3g} hours at {rate / 1e9:,.0f} GFLOP/s",
    ]


if __name__ == "__main__":
    main()
