"""Cost of guidance and of head training, side by side in one run: python -m experiments.benchmark.speed"""

import ctypes
import gc
import json
import multiprocessing
import shlex
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm import tqdm

from experiments.benchmark.architectures import UNETS, count_parameters, make_unet
from experiments.benchmark.counting import counted_passes, flop_counter
from experiments.benchmark.workloads import (
    TASKS,
    UNGUIDED_MODES,
    Bench,
    Settings,
    clock,
    head_speed,
    modes_of,
    training_speed,
)
from rg.backbone.loading import PRECISIONS
from rg.cli import command, link_latest, quiet_libraries
from rg.io.files import write_json

# What a model takes beside its U-Net's weights: autoencoder, head, activations, libraries.
MEMORY_MARGIN = 2 * 2**30
# (task, mode); the task is "" where the mode does not depend on it.
Run = tuple[str, str]


def runs_of(modes: list[str] | None = None) -> list[Run]:
    """Everything that is measured, or those of some modes."""
    tasks = [(task, mode) for task in TASKS for mode in modes_of(task) if mode not in UNGUIDED_MODES]
    return [run for run in [*(("", mode) for mode in UNGUIDED_MODES), *tasks] if modes is None or run[1] in modes]


def lacking_memory(settings: Settings, margin: int = MEMORY_MARGIN) -> str | None:
    """Why a model cannot be measured here; None where its U-Net's weights and `margin` bytes beside them fit."""
    if settings.model not in UNETS:
        return None
    with torch.device("meta"):
        weights = count_parameters(make_unet(settings.model)) * PRECISIONS[settings.precision].itemsize
    if torch.device(settings.device).type == "cuda":
        free = torch.cuda.mem_get_info(settings.device)[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    needed = weights + margin
    return None if needed <= free else f"expected {needed / 1e9:.1f} GB of free memory, found {free / 1e9:.1f} GB"


def _resident(field: str) -> float:
    """A field of /proc/self/status in MB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _measure_peak(settings: Settings, run: Run, queue: Any) -> None:
    quiet_libraries()
    (task, mode), bench = run, Bench(settings)
    bench.run("floor", "")  # what a first run allocates for good belongs to none
    if torch.device(settings.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        bench.run(mode, task)
        queue.put((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _resident("VmRSS")
    bench.run(mode, task)
    queue.put(_resident("VmHWM") - before)


def peak_memory(settings: Settings, run: Run) -> float:
    """MB that a run of one step takes in a fresh process at most, beyond the weights: resident, or allocated on a GPU.

    Raises:
        RuntimeError: the process failed.
    """
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_peak, args=(replace(settings, steps=1), run, queue))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"memory of {settings.model} {run}: the measuring process ended with {process.exitcode}")
    return queue.get()


def times_and_counts(bench: Bench, repeats: int, bar: tqdm) -> tuple[dict[Run, float], dict[Run, dict[str, float]]]:
    """Median seconds per step of one batch, the runs in turn, and what is counted per step and image."""
    steps, share = bench.settings.steps, bench.settings.steps * bench.settings.images
    seconds: dict[Run, list[float]] = {run: [] for run in runs_of()}
    counts: dict[Run, dict[str, float]] = {}
    for task, mode in seconds:
        with flop_counter() as counter, counted_passes(bench.pipe.unet) as passes:
            bench.run(mode, task)
        rows = {"forwards": passes.forwards / share, "backwards": passes.backwards / share}
        counts[task, mode] = {**rows, "gflop": counter.get_total_flops() / share / 1e9}
        bar.update()
    for _ in range(repeats):
        for (task, mode), times in seconds.items():
            begin = clock(bench.backbone.device)
            bench.run(mode, task)
            times.append((clock(bench.backbone.device) - begin) / steps)
            bar.update()
    return {run: statistics.median(times) for run, times in seconds.items()}, counts


def task_results(
    task: str, seconds: dict[Run, float], counts: dict[Run, dict[str, float]], peaks: dict[Run, float]
) -> dict[str, Any]:
    """A task's figures. A drag's speed-up and operations count the reference's run with every image."""

    def of_task(values: dict[Run, Any]) -> dict[str, Any]:
        return {mode: value for (owner, mode), value in values.items() if owner in ("", task)}

    time, count, peak = of_task(seconds), of_task(counts), of_task(peaks)
    ours = ("score", "record") if "record" in time else ("score",)
    results = {
        "speedup_over_release": time["released"] / sum(time[mode] for mode in ours),
        "over_floor": time["score"] / time["floor"],
        "gflop_over_release": sum(count[mode]["gflop"] for mode in ours) / count["released"]["gflop"],
        "gflop_over_floor": count["score"]["gflop"] / count["floor"]["gflop"],
        "seconds_per_step": time,
        "peak_mb": peak,
        "counted_per_step": count,
    }
    if {"score", "released"} <= peak.keys():
        results["memory_over_release"] = peak["score"] / peak["released"]
    return results


def measure(settings: Settings, cfg: DictConfig, batch_size: int, name: str) -> dict[str, Any]:
    """All figures of one model; its own process holds the model only while it is timed."""
    memory_runs = runs_of(list(cfg.memory_modes))
    total = len(memory_runs) + len(runs_of()) * (1 + cfg.repeats) + 2
    with tqdm(total=total, desc=name) as bar:
        peaks = {}
        for run in memory_runs:
            peaks[run] = peak_memory(settings, run)
            bar.update()
        bench = Bench(settings)
        seconds, counts = times_and_counts(bench, cfg.repeats, bar)
        results: dict[str, Any] = {task: task_results(task, seconds, counts, peaks) for task in TASKS}
        results["training"] = training_speed(bench, batch_size=batch_size, steps=cfg.training_steps)
        bar.update()
        results["head"] = head_speed(bench, batch_size=batch_size, repeats=cfg.head_repeats)
        bar.update()
    return {**results, "settings": {**asdict(settings), "batch_size": batch_size}}


def benchmark(cfg: DictConfig, run_dir: Path, command: str, margin: int = MEMORY_MARGIN) -> dict[str, Any]:
    """Measures every model that fits into memory, see `lacking_memory`, and writes results.json after each.

    Raises:
        ValueError: a model has no entry in `sizes`.
    """
    unknown = sorted(set(cfg.models) - set(cfg.sizes))
    if unknown:
        raise ValueError(f"models: expected some of {sorted(cfg.sizes)}, got {unknown}")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "command": command}
    for model in cfg.models:
        size = cfg.sizes[model]
        for precision in size.precisions:
            name = model if len(size.precisions) == 1 else f"{model}_{precision}"
            settings = Settings(model, size.latent_side, precision, size.images, size.steps, cfg.seed, device)
            lacking = lacking_memory(settings, margin)
            if lacking:
                print(f"{name}: left out: {lacking}")
                continue
            results[name] = measure(settings, cfg, size.batch_size, name)
            write_json(run_dir / "results.json", results)
            gc.collect()
    return results


@command("experiments/benchmark")
def main(cfg: DictConfig) -> None:
    """Times and measures, prints results.json, and points `latest` at it."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    command = shlex.join(["python", "-m", "experiments.benchmark.speed", *sys.argv[1:]])
    print(json.dumps(benchmark(cfg, run_dir, command), indent=1))
    link_latest(run_dir)


if __name__ == "__main__":
    main()
