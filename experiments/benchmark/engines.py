"""Label making by every engine, side by side on this machine: python -m experiments.benchmark.engines

All run the same command one after the other, each with its own start, and must leave the same bytes.
"""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data_prep.writer import ShardMaker, Span
from rg.cli import CONF, command
from rg.data.shards import Manifest
from rg.io.files import write_json


def time_parts(cfg: DictConfig, count: int = 100) -> dict[str, float]:
    """Seconds per sample of reading, labelling and encoding on one thread, of the whole shard, and its bytes."""
    torch.set_num_threads(1)
    recipe = cfg.data.builder
    with tempfile.TemporaryDirectory() as place:
        plain = OmegaConf.to_container(recipe, resolve=True)
        calls = {
            name: partial(instantiate, plain[name], _convert_="all") for name in ("source", "annotator", "backbone")
        }
        maker = ShardMaker(folder=Path(place), split="train", encode_batch=recipe.encode_batch, **calls)
        maker("warm-up", Span(0, 2, 0, 0))  # loads everything
        begin, seconds = time.perf_counter(), {}

        def lap(name: str) -> None:
            nonlocal begin
            seconds[name] = (time.perf_counter() - begin) / count
            begin = time.perf_counter()

        samples = maker.source.read("train", range(count))
        lap("read")
        labels = maker.annotator.annotate(samples)
        lap("label")
        maker._encode(torch.cat([label.to_encode(item) for label, item in zip(labels, samples, strict=True)]))
        lap("encode")
        made = maker("shard", Span(0, count, 0, 0))
        lap("all")
        seconds["bytes"] = (Path(place) / "shard").stat().st_size / made["samples"]
    return seconds


def run(cfg: DictConfig, place: Path, engine: str, workers: int | None, kill: bool = False) -> dict[str, Any]:
    """One run of the command in an empty folder: its seconds, and a hash of all that it left."""
    words = ["data=pose", f"n={cfg.n}", f"data.builder.shard_size={cfg.shard_size}", f"engine={engine}", "seed=0"]
    words += [] if workers is None else [f"engine.workers={workers}"]
    words += ["engine.cluster=local"] if engine == "slurm" else []
    name = f"{engine}-{workers}{'-killed' * kill}"
    words.append(f"data.builder.root={place / name}")
    line = [sys.executable, "-m", "data_prep.prepare", *words]
    environment = os.environ | {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1"}
    begin = time.monotonic()
    process = subprocess.Popen(line, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if kill:
        _kill_one(process, place / name / "train", cfg.n // cfg.shard_size // 2)
    said = process.communicate()[1].decode()
    seconds = time.monotonic() - begin
    if process.returncode:
        raise RuntimeError(said)
    folder = place / name / "train"
    files = sorted(folder.glob("[!.]*"))
    digest = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()[:16]
    samples = len(Manifest.read(folder).indices())
    return {"engine": engine, "workers": workers, "killed": kill, "seconds": seconds, "sha256": digest, "n": samples}


def _kill_one(process: subprocess.Popen[bytes], folder: Path, shards: int) -> None:
    """Kills one of the processes that write a shard, once so many are finished."""
    while len(list(folder.glob("*.tar"))) < shards or not (writing := _writers(folder)):
        if process.poll() is not None:
            return
        time.sleep(0.02)
    os.kill(writing[0], signal.SIGKILL)


def _writers(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if path.readlink().is_relative_to(folder) and path.readlink().suffix == ".part":
                found.append(int(path.parts[2]))
        except OSError:  # it has ended, or is another's
            continue
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per run."""
    first = runs[0]
    lines = ["| engine | workers | seconds | of serial's | same bytes |", "|---|---|---|---|---|"]
    for row in runs:
        name = row["engine"] + (", one killed" if row["killed"] else "")
        same = "yes" if row["sha256"] == first["sha256"] else "NO"
        ratio = row["seconds"] / first["seconds"]
        lines.append(f"| {name} | {row['workers'] or 1} | {row['seconds']:.0f} | {ratio:.2f} | {same} |")
    return "\n".join(lines)


@command("engines", stopped="nothing is kept")
def main(cfg: DictConfig) -> None:
    """Times the parts of a sample, then every engine; prints a table and writes the record."""
    parts = time_parts(cfg)
    print(", ".join(f"{name} {value:.4g}" for name, value in parts.items()))
    wanted: list[tuple[str, int | None, bool]] = [("serial", None, False)]
    wanted += [(engine, count, False) for engine in cfg.engines for count in cfg.counts]
    wanted += [("pool", 2, True)] if cfg.kill else []
    runs = []
    with tempfile.TemporaryDirectory() as place:
        for engine, workers, kill in wanted:
            runs.append(run(cfg, Path(place), engine, workers, kill))
            print(table(runs[:1] + runs[-1:]).splitlines()[-1], flush=True)
    print(table(runs))
    write_json(Path(cfg.record), {"parts": parts, "runs": runs, "n": cfg.n, "shard_size": cfg.shard_size})


if __name__ == "__main__":
    main()
