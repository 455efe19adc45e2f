"""Writes the shards of one folder: each under a temporary name until it is whole, then renamed and counted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from webdataset import TarWriter

from data_prep.records import Annotator, Skip, Source
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.samples import DataError, Group, Sample
from rg.data.shards import Manifest, read_shard
from rg.io.files import atomic
from rg.io.images import from_bytes

READ = 50  # indices that are read and labelled at a time


class ShardWriter:
    """Brings one folder to a number of samples.

    Args:
        folder: <root>/<split>.
        manifest: of that folder; every finished shard is entered and the manifest written.
        source: gives the images.
        annotator: gives their labels.
        backbone: gives their latents.
        encode_batch: images that go through the autoencoder at once, always as many: a latent's last bits depend on it.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        source: Source,
        annotator: Annotator,
        backbone: DiffusionBackbone,
        encode_batch: int,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.source = source
        self.annotator = annotator
        self.backbone = backbone
        self.encode_batch = encode_batch

    def fill(self, count: int, shard_size: int) -> None:
        """Brings the folder to `count` samples: where some are skipped it goes on, up to 2 * count indices."""
        stop = count
        self.write(stop, shard_size)
        while (lacking := count - len(self.manifest.indices())) > 0 and stop < 2 * count:
            stop = min(stop + lacking, 2 * count)
            self.write(stop, shard_size)

    def write(self, stop: int, shard_size: int) -> None:
        """Brings the folder to `stop` indices, with a progress bar."""
        todo = []
        for number, start in enumerate(range(0, stop, shard_size)):
            name, span = f"shard-{number:06d}.tar", range(start, min(start + shard_size, stop))
            if self._counted(name, span)["stop"] < span.stop:
                todo.append((name, span))
        if not todo:
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns) as progress:
            total = sum(span.stop - self._counted(name, span)["stop"] for name, span in todo)
            task = progress.add_task(f"making {self.folder}", total=total)
            for name, span in todo:
                self._write_shard(name, span, lambda count: progress.advance(task, count))

    def _counted(self, name: str, span: range) -> dict[str, int]:
        return self.manifest.shards.get(name, {"start": span.start, "stop": span.start, "samples": 0})

    def _write_shard(self, name: str, span: range, advance: Callable[[int], None]) -> None:
        old = self._counted(name, span)
        path = self.folder / name
        skipped, samples = {}, old["samples"]
        with (
            atomic(path) as temporary,
            temporary.open("wb") as stream,
            TarWriter(stream, encoder=False, mtime=0) as writer,
        ):
            # A shard that was the last one, and short, is continued: what it holds is copied, not made again.
            for raw in read_shard(path, old) if samples else ():
                writer.write({key: value for key, value in raw.items() if key != "__url__"})
            for start in range(old["stop"], span.stop, READ):
                batch = range(start, min(start + READ, span.stop))
                for index, made in self._make(batch):
                    if isinstance(made, Skip):
                        skipped[f"{index:08d}"] = made.reason
                    else:
                        self.manifest.kind = "group" if isinstance(made, Group) else "image"
                        writer.write(made.encode())
                        samples += 1
                advance(len(batch))
        self.manifest.shards[name] = {"start": span.start, "stop": span.stop, "samples": samples}
        made = {f"{index:08d}" for index in range(old["stop"], span.stop)}  # again perhaps, and now with a label
        self.manifest.skipped = {key: why for key, why in self.manifest.skipped.items() if key not in made} | skipped
        self.manifest.write(self.folder)

    def _make(self, indices: Sequence[int]) -> list[tuple[int, Sample | Group | Skip]]:
        made: dict[int, Any] = dict(zip(indices, self.source.read(self.manifest.split, indices), strict=True))
        read = {index: item for index, item in made.items() if not isinstance(item, Skip)}
        labels = dict(zip(read, self.annotator.annotate(list(read.values())), strict=True)) if read else {}
        made |= {index: label for index, label in labels.items() if isinstance(label, Skip)}
        images = {i: label.to_encode(read[i]) for i, label in labels.items() if not isinstance(label, Skip)}
        if images:
            latents = self._encode(torch.cat(list(images.values()))).split([len(group) for group in images.values()])
            for index, latent in zip(images, latents, strict=True):
                if not latent.isfinite().all():
                    raise DataError(f"{self.folder}: the latent of sample {index:08d} is not finite in half precision")
                made[index] = labels[index].sample(index, read[index], latent)
        return list(made.items())

    def _encode(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of uint8 images: (B, 2C, h, w) float16."""
        rest = images.new_zeros(-len(images) % self.encode_batch, *images.shape[1:])
        batches = torch.cat([images, rest]).split(self.encode_batch)
        latents = [torch.cat(self.backbone.encode(from_bytes(batch)), 1).half().cpu() for batch in batches]
        return torch.cat(latents)[: len(images)]
