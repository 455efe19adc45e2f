"""The pictures and prompts that the embedded model learns from, rendered once and kept on disk."""

import hashlib
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.marionette import render

SPLITS = {"train": 0, "held_out": 1}
FILE_PICTURES = 1000  # pictures in a file, the piece of work that an interruption can cost
CHUNK = 50


class Pictures(NamedTuple):
    """N pictures: image (N, 3, H, W) uint8, their prompts, and a name that tells them from all others."""

    image: Tensor
    prompt: list[str]
    name: str


def world_id(seed: int) -> str:
    """Eight hexadecimal digits that change when the renderer draws other pictures."""
    stills = render([(seed, 0, index) for index in range(8)])
    return hashlib.sha256(stills.image.numpy().tobytes() + " ".join(stills.prompt).encode()).hexdigest()[:8]


def write_file(path: Path, seed: int, split: int, start: int, stop: int) -> Path:
    """Renders pictures start..stop of a split into path (.npy), their prompts beside it (.json), each file whole."""
    torch.set_num_threads(1)
    parts = [
        render([(seed, split, index) for index in range(first, min(first + CHUNK, stop))])
        for first in range(start, stop, CHUNK)
    ]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([prompt for part in parts for prompt in part.prompt]), encoding="utf-8")
    partial.replace(path.with_suffix(".json"))
    with partial.open("wb") as file:
        np.save(file, torch.cat([part.image for part in parts]).numpy())
    partial.replace(path)
    return path


def _render_all(jobs: list[tuple[Path, int, int, int, int]], workers: int) -> Iterator[Path]:
    if workers == 1:
        yield from (write_file(*job) for job in jobs)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from (done.result() for done in as_completed([pool.submit(write_file, *job) for job in jobs]))


def load_pictures(folder: Path, *, seed: int, split: str, count: int, workers: int) -> Pictures:
    """The first `count` pictures of a split, in the order of their indices; files that are missing are rendered first.

    Args:
        folder: where the files are kept; other seeds and other versions of the world get files of their own.
        split: a key of SPLITS.
        workers: processes that render.
    """
    name = f"{world_id(seed)}-{seed}-{split}"
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    bounds = [(start, min(start + FILE_PICTURES, count)) for start in range(0, count, FILE_PICTURES)]
    files = [folder / f"{start}-{stop}.npy" for start, stop in bounds]
    jobs = [
        (file, seed, SPLITS[split], *bound) for file, bound in zip(files, bounds, strict=True) if not file.is_file()
    ]
    if jobs:
        list(
            tqdm(_render_all(jobs, min(workers, len(jobs))), f"rendering {split}", len(jobs), unit_scale=FILE_PICTURES)
        )
    images = np.concatenate([np.load(file) for file in files])
    prompts = [prompt for file in files for prompt in json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))]
    return Pictures(torch.from_numpy(images), prompts, f"{name}-{count}")
