"""A split on disk: the manifest of its folder, its shards, and reading them into memory.

A split's folder holds shard-000000.tar, shard-000001.tar, ... and manifest.json.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
from pydantic import ConfigDict, Field, model_validator
from webdataset.tariterators import group_by_keys

from rg.data.samples import RECORDS, DataError, Group, Groups, Sample, Samples
from rg.io.files import read_json, write_json
from rg.io.records import Record, validate

MAX_MEMBER = 2**28  # bytes: a lossless image of 64 million pixels
MAX_MANIFEST = 2**29  # bytes: reasons for a few million indices that were skipped
Index = Annotated[int, Field(ge=0, le=10**8)]  # keys have eight digits


class _Shard(Record):
    start: Index
    stop: Index
    samples: Index

    @model_validator(mode="after")
    def _holds_no_more_than_its_range(self) -> Self:
        if not self.samples <= self.stop - self.start:
            raise ValueError("expected at most one sample for each index from start to stop")
        return self


class _Manifest(Record):
    model_config = ConfigDict(extra="forbid")
    samples: Index
    split: str
    settings: dict[str, Any]
    autoencoder_id: str
    versions: dict[str, str]
    shards: dict[Annotated[str, Field(pattern=r"^shard-[0-9]{6}\.tar$")], _Shard]
    skipped: dict[Annotated[str, Field(pattern=r"^[0-9]{8}$")], str]
    kind: Literal["image", "group"] | None = None

    @model_validator(mode="after")
    def _accounts_for_every_index(self) -> Self:
        indices = sum(shard.stop - shard.start for shard in self.shards.values())
        known = sum(shard.samples for shard in self.shards.values()) + len(self.skipped)
        if indices > known:
            raise ValueError(
                f"expected a sample or a reason for each of {indices:,} indices of `shards`, got {known:,}"
            )
        return self


@dataclass
class Manifest:
    """What a split's folder holds and how it was made.

    Attributes:
        split: one of SPLITS.
        settings: everything that decides what is in the shards; the same settings give the same bytes.
        autoencoder_id: the autoencoder behind the stored latents.
        versions: of the packages that wrote the last shard.
        shards: per finished shard its range of indices, "start" and "stop" (exclusive), and its number of "samples".
        skipped: key of each index in those ranges that has no sample, and why.
        kind: what the samples are, a key of rg.data.samples.RECORDS; None before the first, and in older manifests.
    """

    split: str
    settings: dict[str, Any]
    autoencoder_id: str
    versions: dict[str, str]
    shards: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    kind: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads `folder`/manifest.json.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / "manifest.json"
        if not path.exists():
            raise DataError(f"no labelled images in {folder}: {path} does not exist")
        try:
            record = validate(_Manifest, read_json(path, limit=MAX_MANIFEST), str(path))
        except ValueError as error:
            raise DataError(str(error)) from error
        return cls(**record.model_dump(exclude={"samples"}))

    def write(self, folder: Path) -> None:
        """Writes `folder`/manifest.json, whole or not at all, with the total of samples beside the fields."""
        content = {"samples": sum(shard["samples"] for shard in self.shards.values()), **asdict(self)}
        for name in ("shards", "skipped"):
            content[name] = dict(sorted(content[name].items()))
        write_json(folder / "manifest.json", content)

    def indices(self) -> list[int]:
        """The indices that have a sample, in order."""
        ranges = (range(shard["start"], shard["stop"]) for _, shard in sorted(self.shards.items()))
        return [index for span in ranges for index in span if f"{index:08d}" not in self.skipped]


def read_shard(path: Path, shard: Mapping[str, int]) -> Iterator[dict[str, Any]]:
    """Yields the undecoded samples of one shard, through webdataset; no member is ever written to a path.

    A file may hold more than the manifest counts, where a writer was killed between the two: the rest is left out.

    Args:
        path: the file.
        shard: its entry in the manifest.

    Raises:
        DataError: the file is missing or truncated, or a member's name is not of the schema.
    """
    expected, count = shard["samples"], 0
    if not path.is_file():
        raise DataError(f"{path} is missing, but the manifest lists it with {expected} samples")
    with path.open("rb") as stream:
        raws = group_by_keys(_members(path, stream))
        try:
            for raw in raws:
                key = raw["__key__"]
                if not re.fullmatch(r"\d{8}", key):
                    raise ValueError(f"expected keys of eight digits, found {key!r}")
                if int(key) < shard["stop"]:
                    count += 1
                    yield raw
        except (OSError, EOFError, ValueError, MemoryError, OverflowError, tarfile.TarError) as error:
            raise DataError(f"{path} is truncated or damaged after {count} of {expected} samples: {error}") from error
    if count != expected:
        raise DataError(f"{path} is truncated: expected {expected} samples, found {count}")


def _members(path: Path, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """The plain files of a tar as webdataset groups them, each bounded before it is read; no link is followed."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if not member.isreg():
                continue
            if member.issparse() or member.size > MAX_MEMBER:
                size = f"{member.size:,}{' sparse' if member.issparse() else ''}"
                raise ValueError(
                    f"{member.name}: expected a plain member of at most {MAX_MEMBER:,} bytes, found {size}"
                )
            yield {"fname": member.name, "data": tar.extractfile(member).read(), "__url__": str(path)}
            tar.members = []  # else it keeps the header of everything that was read


def read_samples(folder: Path, manifest: Manifest, wanted: Sequence[int]) -> list[Sample] | list[Group]:
    """Reads the samples with the `wanted` indices, in that order, opening only the shards that hold one.

    Raises:
        DataError: see `read_shard`, `Sample.decode` and `Group.decode`.
    """
    missing, samples = set(wanted), {}
    for name, shard in sorted(manifest.shards.items()):
        if missing.isdisjoint(range(shard["start"], shard["stop"])):
            continue
        for raw in read_shard(folder / name, shard):
            if int(raw["__key__"]) in missing:
                kind = manifest.kind or ("group" if "0.png" in raw else "image")  # older manifests do not say
                samples[int(raw["__key__"])] = RECORDS[kind].decode(raw, folder / name)
    missing -= samples.keys()
    if missing:
        raise DataError(f"{folder}: the shards lack sample {min(missing):08d}, which the manifest counts")
    return [samples[index] for index in wanted]


def read_shards(
    folder: str | Path,
    size: int | None = None,
    *,
    available: int | None = None,
    seed: int = 0,
    autoencoder_id: str | None = None,
) -> Samples | Groups:
    """Reads samples of one split from `folder`, <root>/<split>, into memory.

    Subsets are nested: a smaller `size` gives a part of a larger one. Without `available` the subset is the first
    `size` samples, which is random where a source draws every sample by itself, as a renderer does. With `available`
    it is the first `size` of a permutation, seeded by `seed`, of the samples among the first `available` indices: for
    sources in whose order lies a meaning, such as folders sorted by name.

    A `size` of None takes all; an `autoencoder_id` of None accepts any.

    Raises:
        DataError: missing folder or shard, truncated or damaged shard, missing member, fewer samples than asked for,
            another autoencoder, images of several sizes.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if autoencoder_id not in (None, manifest.autoencoder_id):
        raise DataError(
            f"{folder}: expected latents of autoencoder {autoencoder_id}, found {manifest.autoencoder_id}: "
            "make the labels anew for this backbone in another folder (root=...)"
        )
    pool = manifest.indices()
    if available is not None:
        pool = [index for index in pool if index < available]
        pool = [pool[place] for place in np.random.default_rng(seed).permutation(len(pool))]
    if not pool or len(pool) < (size or 0):
        skipped = f"{len(manifest.skipped)} indices were skipped, manifest.json says why"
        raise DataError(f"{folder}: expected {size or 'at least 1'} samples, found {len(pool)} ({skipped})")
    samples = read_samples(folder, manifest, pool[:size])
    try:
        return (Groups if isinstance(samples[0], Group) else Samples).stack(samples)
    except RuntimeError as error:
        raise DataError(f"{folder}: expected images and latents of one size: {error}") from error
