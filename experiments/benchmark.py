"""Cost of guidance and of head training, side by side in one run: python -m experiments.benchmark"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rg.evaluation import write_text
from rg.guidance import GuidanceTerm, ReadoutGuidance
from rg.runs import clear_errors, point_latest, quiet_libraries
from rg.sampling import generate
from rg.targets import FixedTarget

# What is timed: how ReadoutGuidance is called; None samples plainly.
MODES: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "score": {"update": "score"},
    "score_checkpointing": {"update": "score", "checkpointing": True},
    "adam": {"update": "adam"},
    "released": {"update": "adam", "branch": "both", "latent_range_factor": True},
}


def _parts(cfg: DictConfig) -> tuple[Any, Any]:
    torch.manual_seed(cfg.seed)
    backbone = instantiate(cfg.world.backbone)
    widths = {"tap_channels": backbone.tap_channels, "time_embed_dim": backbone.time_embed_dim}
    head = instantiate(cfg.head, **widths, _convert_="all")
    return backbone, head.attach_backbone(backbone).to(backbone.device)


def _sampler(cfg: DictConfig, mode: str) -> Callable[[], Any]:
    backbone, head = _parts(cfg)
    head = head.eval().requires_grad_(False)
    keypoints = torch.rand(cfg.images, 1, 18, 3) * backbone.resolution[0]
    settings = MODES[mode]
    guidance = None
    if settings is not None:
        guidance = ReadoutGuidance([GuidanceTerm(head, FixedTarget(keypoints))], readout_scale=1.0, **settings)
    arguments = {"num_inference_steps": cfg.steps, "guidance_scale": 2.0, "seeds": range(cfg.images)}
    return lambda: generate(backbone.pipeline, ["a person"] * cfg.images, guidance=guidance, **arguments)


def _resident(field: str) -> float:
    """A field of /proc/self/status in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _peak_memory(settings: dict[str, Any], mode: str, queue: Any) -> None:
    quiet_libraries()
    run = _sampler(OmegaConf.create(settings), mode)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    baseline = _resident("VmRSS")
    run()
    queue.put(_resident("VmHWM") - baseline)


def peak_memory(cfg: DictConfig, mode: str) -> float:
    """Peak resident size of a fresh process that samples one batch, less its size before, in MB."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    settings = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, ["seed", "images", "steps", "world", "head"]), resolve=True
    )
    process = context.Process(target=_peak_memory, args=(settings, mode, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"memory of {mode}: the measuring process ended with {process.exitcode}")
    return queue.get()


def seconds_per_step(cfg: DictConfig) -> dict[str, list[float]]:
    """Seconds per denoising step of one batch, the modes in turn, `repeats` times after a warm-up."""
    samplers = {mode: _sampler(cfg, mode) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(cfg.repeats + 1):
        for mode, run in samplers.items():
            begin = time.perf_counter()
            run()
            if turn:
                seconds[mode].append((time.perf_counter() - begin) / cfg.steps)
    return seconds


def training_speed(cfg: DictConfig) -> dict[str, float]:
    """Training steps per second on cached latents, batches of `images`, after a warm-up of three."""
    backbone, head = _parts(cfg)
    shape = (cfg.images, backbone.latent_channels, *backbone.latent_size)
    size = backbone.resolution
    batch = {
        "latent_mean": torch.randn(shape),
        "latent_std": torch.full(shape, 0.03),
        "keypoints": torch.rand(cfg.images, 1, 18, 3) * size[0],
        "label": torch.full((cfg.images, 3, *size), -1.0),
        "index": torch.arange(cfg.images),
    }
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for step in range(cfg.training_steps + 3):
        if step == 3:
            begin = time.perf_counter()
        drawn = {key: value.to(backbone.device) for key, value in {**batch, "draw": batch["index"] * 0 + step}.items()}
        optimizer.zero_grad()
        head.loss(head.read(*head.draw(drawn)), drawn).backward()
        optimizer.step()
    return {"steps_per_second": cfg.training_steps / (time.perf_counter() - begin), "batch_size": cfg.images}


def benchmark(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Measures everything and writes results.json."""
    seconds = {mode: statistics.median(times) for mode, times in seconds_per_step(cfg).items()}
    results = {
        "images": cfg.images,
        "threads": torch.get_num_threads(),
        "seconds_per_step": seconds,
        "ratio_to_plain": {mode: value / seconds["plain"] for mode, value in seconds.items()},
        "peak_mb": {mode: peak_memory(cfg, mode) for mode in MODES},
        "training": training_speed(cfg),
        "command": "python -m experiments.benchmark",
    }
    write_text(run_dir / "results.json", {cfg.world.name: results})
    return results


@hydra.main(version_base="1.3", config_path="../conf", config_name="benchmark")
@clear_errors
def main(cfg: DictConfig) -> None:
    """Times and measures, prints results.json, and points `latest` at it."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    print(json.dumps(benchmark(cfg, run_dir), indent=1))
    point_latest(run_dir)


if __name__ == "__main__":
    main()
