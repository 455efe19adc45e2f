"""Label making: source -> annotator -> autoencoder -> webdataset shards, resumable and counted.

`python -m data_prep.prepare data=pose n=8500` builds the split "train" of data/marionette_pose.
"""

import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.utils import instantiate
from omegaconf import DictConfig

from data_prep.engines import Engine, Serial
from data_prep.records import Source
from data_prep.writer import ShardMaker, ShardWriter
from rg.cli import command
from rg.data.samples import SPLITS, DataError
from rg.data.shards import Manifest

log = logging.getLogger(__name__)
PACKAGES = ("torch", "diffusers", "numpy", "pillow", "webdataset")
# What decided the images of folders whose manifest does not say it yet.
FORMER = {"encode_batch": 50, "annotator.batch_size": 10}


def build(
    *,
    root: str,
    source: Mapping[str, Any],
    annotator: Mapping[str, Any],
    backbone: Mapping[str, Any],
    shard_size: int,
    encode_batch: int = 50,
    labels: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    fill: bool = False,
    split: str = "train",
    n: int | None = None,
) -> Manifest:
    """Makes n samples of a split in <root>/<split>, except those that are there already; returns the manifest.

    The bytes of the folder depend on the settings and the largest n alone, not on how often the work was interrupted,
    continued or extended, nor on where it is done. Two processes may ask for the same folder: the second waits, and
    finds its work done.

    Args:
        root: folder of the data set.
        source: constructor call (`_target_` and arguments) of a source, see data_prep.sources.folders.
        annotator: constructor call of an annotator, see data_prep.annotators.
        backbone: call that gives the rg.backbone.diffusion.DiffusionBackbone whose autoencoder makes the latents.
        shard_size: indices per shard.
        encode_batch: images that go through the autoencoder at once; the last bits of the latents depend on it.
        labels: constructor call of an annotator that reads files, which stands for the other where its `path` is given.
        engine: constructor call of what has the shards made, see data_prep.engines; None: this process.
        fill: go on where indices are skipped, to the last of a finite source.
        split: one of SPLITS.
        n: number of samples of an endless source, which goes on where some are skipped, up to index 2n; of a finite
            one the number of indices, of which the skipped ones give no sample, or with `fill` of samples, as long as
            there are any; None takes all of it.

    Raises:
        DataError: before any work, unknown split, bad n or encode_batch, a source without that many images or another
            resolution than the backbone's, a folder made with other settings; later, a latent that is not finite.
    """
    _check(split, encode_batch)
    if labels is not None and labels["path"] is not None:
        annotator = labels
    runner: Engine = Serial() if engine is None else instantiate(engine, _convert_="all")
    given = {"source": source, "annotator": annotator, "backbone": backbone}
    calls = {name: partial(instantiate, call, _convert_="all") for name, call in given.items()}
    maker = ShardMaker(folder=Path(root) / split, split=split, encode_batch=encode_batch, **calls)
    stop = _stop(maker.source, split, n)
    settings = {"source": dict(source), "annotator": dict(annotator), "shard_size": shard_size}
    wanted = _wanted(maker, settings | {"encode_batch": encode_batch})
    return _bring(wanted, maker, runner, stop, maker.source.count(split) if fill else stop)


def _wanted(maker: ShardMaker, settings: dict[str, Any]) -> Manifest:
    """The manifest of a folder in which nothing is made yet."""
    encoder, side = maker.backbone, maker.source.resolution
    if encoder.resolution != (side, side):
        raise DataError(f"source.resolution: expected the backbone's {encoder.resolution}, got {side}")
    settings["pictures"] = {"resolution": side, **maker.source.describe(maker.split)}
    return Manifest(maker.split, settings, encoder.autoencoder_id, _versions())


def _bring(wanted: Manifest, maker: ShardMaker, engine: Engine, stop: int, last: int | None) -> Manifest:
    """Brings a folder to `stop` indices, and on to the `last` where too few of them have a sample."""
    folder, missing = maker.folder, False
    if not (folder / "manifest.json").is_file() or not _is_whole(_open(folder, wanted), stop, last):
        missing = maker.annotator is not None  # what is bad in its settings is said before there is a folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder), _swept(folder):
        manifest, size = _open(folder, wanted), wanted.settings["shard_size"]
        if missing:
            writer = ShardWriter(folder, manifest, maker, engine)
            if maker.source.count(wanted.split) is None:
                writer.fill(stop, size)
            else:
                _write(writer, stop, last, size)
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s is being made by another process: waiting", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _swept(folder: Path) -> Iterator[None]:
    """Removes what killed processes were writing, of former runs and of this one."""

    def sweep() -> None:
        for unfinished in folder.glob("*.part"):
            unfinished.unlink(missing_ok=True)

    sweep()
    try:
        yield
    finally:
        sweep()


def _is_whole(manifest: Manifest, count: int, last: int | None) -> bool:
    """Whether a finite source gave all indices up to `count`, and where that was not enough up to the last."""
    if last is None:
        return False
    made = {index for shard in manifest.shards.values() for index in range(shard["start"], shard["stop"])}
    enough = len(manifest.indices()) >= count or last == count
    return made.issuperset(range(count if enough else last))


def _write(writer: ShardWriter, count: int, last: int, shard_size: int) -> None:
    """Brings a folder to `count` indices, and where some are skipped on to as many samples, up to the last index."""
    stop = count
    writer.write(stop, shard_size)
    while (lacking := count - len(writer.manifest.indices())) > 0 and stop < last:
        stop = min(stop + lacking, last)
        writer.write(stop, shard_size)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def _check(split: str, encode_batch: int) -> None:
    if split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    if encode_batch < 1:
        raise DataError(f"encode_batch: expected at least 1, got {encode_batch}")


def _stop(source: Source, split: str, n: int | None) -> int:
    count = source.count(split)
    stop = count if n is None else n
    if stop is None:
        raise DataError("n: the source is endless, say how many samples to make, n=...")
    if count == 0:
        raise DataError(
            f"split={split}: expected at least 1 image, found 0: change pictures.validation_share, "
            "pictures.test_share or pictures.seed, or add images"
        )
    if stop < 1 or (count is not None and stop > count):
        raise DataError(f"n: expected 1 to {count or 'any number of'} images of split {split}, got {stop}")
    return stop


def _open(folder: Path, wanted: Manifest) -> Manifest:
    """The folder's manifest, or `wanted` where it has none; refuses one that was made otherwise."""
    if not (folder / "manifest.json").is_file():
        return wanted
    manifest = Manifest.read(folder)
    old = dict(_flat({**manifest.settings, "autoencoder_id": manifest.autoencoder_id}))
    new = dict(_flat({**wanted.settings, "autoencoder_id": wanted.autoencoder_id}))
    old = {key: value for key, value in FORMER.items() if key in new} | old
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            values = f"{old.get(key)!r}, asked for is {new.get(key)!r}"
            raise DataError(f"{folder} was made with {key} = {values}: choose another root=... or delete the folder")
    # A shard that was taken away is made again.
    manifest.shards = {name: shard for name, shard in manifest.shards.items() if (folder / name).is_file()}
    manifest.settings, manifest.versions = wanted.settings, wanted.versions
    return manifest


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@command("prepare", stopped="finished shards are kept; the same command goes on")
def main(config: DictConfig) -> None:
    """Runs the builder of the asked-for labels and images; without a single sample it fails."""
    builder = config.data.builder
    manifest = instantiate(builder)(split=config.split, n=config.n)
    samples, skipped = len(manifest.indices()), len(manifest.skipped)
    counts = f"{builder.root}/{config.split}: {samples} samples, {skipped} skipped (manifest.json)"
    if skipped:
        counts += f", the first: {manifest.skipped[min(manifest.skipped)]}"
    if not samples:
        raise DataError(counts)
    print(counts)


if __name__ == "__main__":
    main()
