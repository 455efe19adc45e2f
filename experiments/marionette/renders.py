"""The images and prompts that the embedded model learns from, rendered once and kept on disk."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.marionette.render import Stills, render
from experiments.marionette.record import Stopwatch
from rg.io.files import atomic, read_json, write_text
from rg.io.records import validate

SPLITS = {"train": 0, "held_out": 1}
FILE_RENDERS = 1000  # images in a file, the piece of work that an interruption can cost
CHUNK = 50  # images rendered at once
Job = tuple[Path, int, int, int, int]  # of `write_file`
Render = Callable[[list[tuple[int, ...]]], Stills]


class Renders(NamedTuple):
    """N images: image (N, 3, H, W) uint8, their prompts, and a name that tells them from all others."""

    image: Tensor
    prompt: list[str]
    name: str


def world_id(seed: int, renderer: Render = render) -> str:
    """Eight hexadecimal digits that change when the renderer draws other images."""
    stills = renderer([(seed, 0, index) for index in range(8)])
    return hashlib.sha256(stills.image.numpy().tobytes() + " ".join(stills.prompt).encode()).hexdigest()[:8]


def write_file(
    path: Path, seed: int, split: int, start: int, stop: int, *, chunk: int = CHUNK, renderer: Render = render
) -> None:
    """Renders images start..stop of a split into path (.npy), their prompts beside it (.json), each file whole."""
    parts = [
        renderer([(seed, split, index) for index in range(first, min(first + chunk, stop))])
        for first in range(start, stop, chunk)
    ]
    write_text(path.with_suffix(".json"), json.dumps([prompt for part in parts for prompt in part.prompt]))
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.save(file, torch.cat([part.image for part in parts]).numpy())


def _render_all(write: Callable[..., None], jobs: list[Job], workers: int) -> Iterator[Job]:
    """Does the jobs, each the arguments of `write`; yields each when it is done."""
    if workers == 1:
        for job in jobs:
            write(*job)
            yield job
        return
    # One thread per process; this process keeps its own, and a worker is no copy of it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        running = {pool.submit(write, *job): job for job in jobs}
        for done in as_completed(running):
            done.result()
            yield running[done]


def load_renders(
    folder: Path,
    *,
    seed: int,
    split: str,
    count: int,
    workers: int,
    per_file: int = FILE_RENDERS,
    chunk: int = CHUNK,
    renderer: Render = render,
) -> Renders:
    """The first `count` images of a split, in the order of their indices; files that are missing are rendered first.

    Args:
        folder: where the files are kept; other seeds and other versions of the world get files of their own.
        split: a key of SPLITS.
        workers: processes that render.
        per_file: images in a file.
        chunk: images rendered at once.
        renderer: gives the stills of seed sequences.
    """
    name = f"{world_id(seed, renderer)}-{seed}-{split}"
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [(start, min(start + per_file, count)) for start in range(0, count, per_file)]
    files = [folder / f"{start}-{stop}.npy" for start, stop in bounds]
    jobs = [
        (file, seed, SPLITS[split], *bound) for file, bound in zip(files, bounds, strict=True) if not file.is_file()
    ]
    if jobs:
        watch, write = Stopwatch(folder), partial(write_file, chunk=chunk, renderer=renderer)
        with tqdm(desc=f"rendering {split}", initial=count - sum(b - a for *_, a, b in jobs), total=count) as progress:
            for *_, start, stop in _render_all(write, jobs, min(workers, len(jobs))):
                watch.note()
                progress.update(stop - start)
    images = np.concatenate([np.load(file) for file in files])
    texts = [file.with_suffix(".json") for file in files]
    prompts = [prompt for text in texts for prompt in validate(list[str], read_json(text), str(text))]
    return Renders(torch.from_numpy(images), prompts, f"{name}-{count}")
