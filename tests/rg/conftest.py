"""A small split on disk, written with the library's own schema."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from webdataset import TarWriter

from rg.data.samples import Sample, to_png
from rg.data.shards import Manifest


def make_sample(index: int) -> Sample:
    generator = torch.Generator().manual_seed(index)
    return Sample(
        index=index,
        image=to_png(torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8)),
        label=to_png(torch.randint(256, (3, 8, 8), generator=generator, dtype=torch.uint8)),
        size=(8, 8),
        keypoints=torch.rand(index % 3, 18, 3, generator=generator) * 8,
        latent=torch.rand(4, 2, 2, generator=generator).half(),
        prompt=f"image {index}",
        kind="noise",
        seed=(0, 0, index),
        identity=[{"shirt": "red"}] * (index % 3),
    )


@pytest.fixture
def make_split() -> Callable[..., list[Sample]]:
    """Writes `count` samples, without the `skipped` indices, to a folder in shards of 10; gives them back."""

    def make(folder: Path, count: int, skipped: Sequence[int] = ()) -> list[Sample]:
        folder.mkdir(parents=True)
        manifest = Manifest(folder.name, {}, "a" * 16, {}, skipped={f"{index:08d}": "unreadable" for index in skipped})
        samples = []
        for number, start in enumerate(range(0, count, 10)):
            stop = min(start + 10, count)
            name, inside = f"shard-{number:06d}.tar", [i for i in range(start, stop) if i not in skipped]
            with TarWriter(str(folder / name), encoder=False, mtime=0) as writer:
                for index in inside:
                    samples.append(make_sample(index))
                    writer.write(samples[-1].encode())
            manifest.shards[name] = {"start": start, "stop": stop, "samples": len(inside)}
        manifest.write(folder)
        return samples

    return make
