"""Makes the shards of one folder, each under a temporary name until it is whole, and counts them in its manifest."""

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from webdataset import TarWriter

from data_prep.engines import Engine
from data_prep.records import Annotator, GroupLabel, Label, Skip, Source, SourceGroup, SourceSample
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import BAD_INPUT
from rg.data.samples import DataError, Group, Sample
from rg.data.shards import Manifest, read_shard
from rg.io.files import atomic
from rg.io.images import from_bytes

READ = 50  # indices that are read and labelled at a time
PAUSE = 20  # the manifest is written at most every so many times as long as its writing took


class Span(NamedTuple):
    """The indices of a shard, start to stop (exclusive); its file holds those below `done`, `samples` of them."""

    start: int
    stop: int
    done: int
    samples: int


class ShardMaker:
    """Makes single shards, in this process or in another: it is pickled without what it has loaded.

    Args:
        folder: <root>/<split>.
        split: one of rg.data.samples.SPLITS.
        source, annotator, backbone: give the images, their labels and their latents; called when first needed.
        encode_batch: images that go through the autoencoder at once, always as many: a latent's last bits depend on it.
    """

    def __init__(
        self,
        *,
        folder: Path,
        split: str,
        source: Callable[[], Source],
        annotator: Callable[[], Annotator],
        backbone: Callable[[], DiffusionBackbone],
        encode_batch: int,
    ) -> None:
        self.folder, self.split, self.encode_batch = folder, split, encode_batch
        self.parts = {"source": source, "annotator": annotator, "backbone": backbone}
        self.advance: Callable[[int], None] = _nothing

    def __getstate__(self) -> dict[str, Any]:
        loaded = {*self.parts, "advance"}
        return {name: value for name, value in vars(self).items() if name not in loaded} | {"advance": _nothing}

    @cached_property
    def source(self) -> Source:
        source = self.parts["source"]()
        if hasattr(source, "attach_backbone"):
            source.attach_backbone(self.backbone)
        return source

    @cached_property
    def backbone(self) -> DiffusionBackbone:
        return self.parts["backbone"]()

    @cached_property
    def annotator(self) -> Annotator:
        annotator = self.parts["annotator"]()
        if hasattr(annotator, "attach_backbone"):
            annotator.attach_backbone(self.backbone)
        return annotator

    def __call__(self, name: str, span: Span) -> dict[str, Any]:
        """Writes <folder>/<name>, whole or not at all.

        Returns:
            "samples": how many it holds; "kind": of the new ones, see rg.data.shards.Manifest, None where there is
            none; "skipped": the keys of new indices without one, and why.

        Raises:
            DataError: a sample that cannot be labelled, by its key and name; a latent that is not finite.
            OSError: the disk is full, or the folder cannot be written to.
        """
        path = self.folder / name
        kind, skipped, samples = None, {}, span.samples
        with (
            atomic(path) as temporary,
            temporary.open("wb") as stream,
            TarWriter(stream, encoder=False, mtime=0) as writer,
        ):
            # A shard that was the last one, and short, is continued: what it holds is copied, not made again.
            for raw in read_shard(path, {"stop": span.done, "samples": samples}) if samples else ():
                writer.write({key: value for key, value in raw.items() if key != "__url__"})
            for start in range(span.done, span.stop, READ):
                batch = range(start, min(start + READ, span.stop))
                for index, made in self._make(batch):
                    if isinstance(made, Skip):
                        skipped[f"{index:08d}"] = made.reason
                    else:
                        kind = "group" if isinstance(made, Group) else "image"
                        writer.write(made.encode())
                        samples += 1
                self.advance(len(batch))
        return {"samples": samples, "kind": kind, "skipped": skipped}

    def _make(self, indices: Sequence[int]) -> list[tuple[int, Sample | Group | Skip]]:
        made: dict[int, Any] = dict(zip(indices, self.source.read(self.split, indices), strict=True))
        read = {index: item for index, item in made.items() if not isinstance(item, Skip)}
        labels = self._label(read)
        made |= {index: label for index, label in labels.items() if isinstance(label, Skip)}
        images = {i: label.to_encode(read[i]) for i, label in labels.items() if not isinstance(label, Skip)}
        if images:
            latents = self._encode(torch.cat(list(images.values()))).split([len(group) for group in images.values()])
            for index, latent in zip(images, latents, strict=True):
                if not latent.isfinite().all():
                    raise DataError(f"{self.folder}: the latent of sample {index:08d} is not finite in half precision")
                made[index] = labels[index].sample(index, read[index], latent)
        return list(made.items())

    def _label(self, items: dict[int, SourceSample | SourceGroup]) -> dict[int, Label | GroupLabel | Skip]:
        """The labels of a batch; an error is raised with the name of the sample that it comes from."""
        try:
            return dict(zip(items, self.annotator.annotate(list(items.values())), strict=True)) if items else {}
        except Exception as error:
            for index, item in items.items() if len(items) > 1 else ():
                self._label({index: item})  # the one that fails alone, too
            where = " to ".join(f"{items[i].name} (sample {i:08d})" for i in dict.fromkeys((min(items), max(items))))
            if isinstance(error, BAD_INPUT):
                raise DataError(f"{self.folder}: {where}: {error}") from error
            error.add_note(f"{self.folder}: {where}")
            raise

    def _encode(self, images: Tensor) -> Tensor:
        """Mean and standard deviation of the latents of uint8 images: (B, 2C, h, w) float16."""
        rest = images.new_zeros(-len(images) % self.encode_batch, *images.shape[1:])
        batches = torch.cat([images, rest]).split(self.encode_batch)
        latents = [torch.cat(self.backbone.encode(from_bytes(batch)), 1).half().cpu() for batch in batches]
        return torch.cat(latents)[: len(images)]


def _nothing(count: int) -> None:
    """Nobody watches."""


class ShardWriter:
    """Brings one folder to a number of samples; it alone writes the manifest.

    Args:
        folder: <root>/<split>.
        manifest: of that folder; every finished shard is entered.
        maker: makes a shard.
        engine: has the shards made, here or elsewhere.
    """

    def __init__(self, folder: Path, manifest: Manifest, maker: ShardMaker, engine: Engine) -> None:
        self.folder, self.manifest, self.maker, self.engine = folder, manifest, maker, engine
        self._due = 0.0

    def fill(self, count: int, shard_size: int) -> None:
        """Brings the folder to `count` samples: where some are skipped it goes on, up to 2 * count indices."""
        stop = count
        self.write(stop, shard_size)
        while (lacking := count - len(self.manifest.indices())) > 0 and stop < 2 * count:
            stop = min(stop + lacking, 2 * count)
            self.write(stop, shard_size)

    def write(self, stop: int, shard_size: int) -> None:
        """Brings the folder to `stop` indices, with a progress bar."""
        todo = {}
        for number, start in enumerate(range(0, stop, shard_size)):
            name = f"shard-{number:06d}.tar"
            old = self.manifest.shards.get(name, {"stop": start, "samples": 0})
            span = Span(start, min(start + shard_size, stop), old["stop"], old["samples"])
            if span.done < span.stop:
                todo[name] = span
        if not todo:
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        finished, total = 0, sum(span.stop - span.done for span in todo.values())
        with Progress(*columns) as progress:
            task = progress.add_task(f"making {self.folder}", total=total)
            self.maker.advance = lambda count: progress.advance(task, count)
            try:
                for name, made in self.engine.map(self.maker, todo):
                    self._enter(name, todo[name], made)
                    finished += todo[name].stop - todo[name].done
                    progress.update(task, completed=finished)
            finally:
                self.maker.advance = _nothing
                if finished:
                    self.manifest.write(self.folder)

    def _enter(self, name: str, span: Span, made: dict[str, Any]) -> None:
        self.manifest.shards[name] = {"start": span.start, "stop": span.stop, "samples": made["samples"]}
        for index in range(span.done, span.stop):  # made again perhaps, and now with a label
            self.manifest.skipped.pop(f"{index:08d}", None)
        self.manifest.skipped |= made["skipped"]
        self.manifest.kind = made["kind"] or self.manifest.kind
        if (begin := time.monotonic()) >= self._due:
            self.manifest.write(self.folder)
            self._due = time.monotonic() + PAUSE * (time.monotonic() - begin)
