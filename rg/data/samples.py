"""The one owner of the sample schema: a labelled image in a shard, many in memory, and a batch of them.

A sample's key is its index in its split, as eight digits. Members: image.png and label.png (RGB, lossless, one size),
json (prompt, kind, seed, identity, size, keypoints), and latent.npy.
A batch is a dict: image and label (B, 3, H, W) float32 in [-1, 1]; keypoints (B, P, 18, 3) float32 of (x, y, visible)
in pixels of the image, absent people all 0; latent_mean and latent_std (B, C, h, w) float32, scaled latents;
prompt list[str]; index (B,) int64, the sample's place in its split; epoch (B,) int64, how often the sample
was seen before in this run.
"""

import io
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from rg.io.files import parse_json
from rg.io.images import decode_png, from_bytes, pixels
from rg.io.keypoints import HeightWidth, Keypoint, Pose, to_tensor
from rg.io.records import Record, validate
from rg.points import Size

# The position of a split is part of a generated sample's seed: append, never reorder.
SPLITS = ("train", "val", "search", "test")
Batch = dict[str, Any]


W = TypeVar("W", bound="Words")


class DataError(ValueError):
    """A folder, shard, member or setting that cannot be used; the message names it, what was expected and found."""


class _Record:
    """What Sample and Group share: a key, words, and how they are written."""

    index: int
    size: Size
    prompt: str
    kind: str
    seed: tuple[int, ...] | None
    identity: list[dict[str, Any]] | None

    def _members(self) -> tuple[dict[str, bytes], dict[str, Any], Tensor]:
        """PNGs by the names of their members, what the json holds beside the words, latents (2C, h, w)."""
        raise NotImplementedError

    def encode(self) -> dict[str, str | bytes]:
        """The record as a webdataset writer takes it: "__key__" and the bytes of each member."""
        images, meta, latent = self._members()
        words = {name: getattr(self, name) for name in ("prompt", "kind", "seed", "identity")}
        return {
            "__key__": f"{self.index:08d}",
            **images,
            "json": json.dumps({**words, "size": list(self.size), **meta}).encode(),
            "latent.npy": to_npy(latent),
        }


@dataclass(frozen=True)
class Sample(_Record):
    """One labelled image.

    Attributes:
        index: position in its split.
        image: PNG, see `to_png`.
        label: PNG.
        size: (H, W) of both.
        keypoints: (P, 18, 3) float32 of (x, y, visible) in pixels of the image; P = 0 where the label has none.
        latent: (2C, h, w) float16: mean, then standard deviation of the scaled latents.
        prompt: a description, or "".
        kind: what the image shows, in the source's words.
        seed: the seed sequence of a generated image, else None.
        identity: the attributes of each person, where the source knows them, else None.
    """

    index: int
    image: bytes
    label: bytes
    size: Size
    keypoints: Tensor
    latent: Tensor
    prompt: str
    kind: str
    seed: tuple[int, ...] | None
    identity: list[dict[str, Any]] | None

    def _members(self) -> tuple[dict[str, bytes], dict[str, Any], Tensor]:
        images = {"image.png": self.image, "label.png": self.label}
        return images, {"keypoints": self.keypoints.tolist()}, self.latent

    @classmethod
    def decode(cls, raw: dict[str, Any], shard: Path) -> Self:
        """Reads what `encode` wrote; `shard` is named in errors. Members of other names are never looked at.

        Raises:
            DataError: a member is missing, unreadable, or of another size or type than the schema says.
        """
        size, words, keypoints = read_member(raw, "json", shard, _from_json)
        read = partial(_checked, size=size)
        image, label = (read_member(raw, f"{name}.png", shard, read) for name in ("image", "label"))
        latent = read_member(raw, "latent.npy", shard, from_npy)
        return cls(int(raw["__key__"]), image, label, size, keypoints, latent, *words)


def read_member(raw: dict[str, Any], member: str, shard: Path, read: Callable[[bytes], Any]) -> Any:
    """What `read` makes of one member of a sample.

    Raises:
        DataError: there is no such member, or `read` fails on it.
    """
    key = raw["__key__"]
    if member not in raw:
        members = sorted(name for name in raw if not name.startswith("__"))
        raise DataError(f"{shard} is truncated or not ours: sample {key} has no {member!r}, only {members}")
    try:
        return read(raw[member])
    except Exception as error:  # a damaged file may fail anywhere inside its decoder
        raise DataError(f"{shard}: {member} of sample {key} cannot be used: {error}") from error


class Words(Record):
    """What the json of any sample holds, see Sample."""

    prompt: str
    kind: str
    seed: list[int] | None
    identity: list[dict[str, Any]] | None
    size: HeightWidth


class SampleWords(Words, Pose):
    """What the json of a labelled image holds."""


class GroupWords(Words):
    """What the json of a group holds, see Group."""

    pictures: Annotated[int, Field(ge=1, le=256)]
    turn: Annotated[float, Field(ge=0)] | None
    points: list[list[Keypoint]]


def read_words(schema: type[W], data: bytes) -> tuple[W, Size, tuple[Any, ...]]:
    """A json as its record, (height, width), and (prompt, kind, seed, identity); raises ValueError for another."""
    meta = validate(schema, parse_json(data.decode("utf-8-sig"), "content", constants=True), "content")
    seed = None if meta.seed is None else tuple(meta.seed)
    return meta, (meta.size[0], meta.size[1]), (meta.prompt, meta.kind, seed, meta.identity)


def _from_json(data: bytes) -> tuple[Any, ...]:
    meta, size, words = read_words(SampleWords, data)
    return size, words, to_tensor(meta.keypoints)


def to_png(image: Tensor) -> bytes:
    """An image (3, H, W) uint8 as a file."""
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, format="PNG")
    return stream.getvalue()


def from_png(data: bytes, size: Size) -> Tensor:
    """(3, H, W) uint8; raises ValueError where the image is damaged or not RGB of this (height, width)."""
    return pixels(decode_png(data, size))


def _checked(data: bytes, size: Size) -> bytes:
    """The bytes, of which `from_png` can make an image."""
    from_png(data, size)
    return data


def to_npy(latent: Tensor) -> bytes:
    """An array as a file."""
    stream = io.BytesIO()
    np.save(stream, latent.numpy(), allow_pickle=False)
    return stream.getvalue()


def from_npy(data: bytes) -> Tensor:
    """Means and standard deviations of latents (2C, h, w) float16; raises ValueError for anything else."""
    stream = io.BytesIO(data)
    if (version := np.lib.format.read_magic(stream)) != (1, 0):
        raise ValueError(f"expected an array in version 1.0 of npy, found {version}")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype != np.float16 or len(shape) != 3 or min(shape) < 1 or shape[0] % 2 or by_columns:
        raise ValueError(f"expected float16 of (2C, h, w), found {dtype} of {shape}")
    if (left := len(data) - stream.tell()) != 2 * math.prod(shape):
        raise ValueError(f"expected {2 * math.prod(shape):,} bytes of {shape}, found {left:,}")
    latent = np.frombuffer(data, np.float16, offset=stream.tell()).reshape(shape)
    if not np.isfinite(latent).all():
        raise ValueError("expected finite latents, found a number that is not")
    return torch.from_numpy(latent.copy())


class _Stack(Dataset[Batch]):
    """What Samples and Groups share: indexing gives one row of every attribute, in the form of a batch.

    Images stay PNGs, as they are in the shard, and are decoded when they are asked for.
    """

    size: Size
    latent: Tensor
    prompt: list[str]

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, position: int) -> Batch:
        row = {field.name: getattr(self, field.name)[position] for field in fields(self) if field.name != "size"}
        mean, std = row.pop("latent").float().chunk(2, -3)
        images = {name: from_bytes(self._decode(row[name])) for name in ("image", "label") if name in row}
        return {**row, **images, "latent_mean": mean, "latent_std": std, "epoch": 0}

    def __getitems__(self, positions: list[int]) -> list[Batch]:
        """Several, their images decoded side by side: it lasts milliseconds for each, and lets other threads run."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.__getitem__, positions))

    def _decode(self, files: bytes | tuple[bytes, ...]) -> Tensor:
        """One image (3, H, W), or those of a group (G, 3, H, W), uint8."""
        if isinstance(files, bytes):
            return from_png(files, self.size)
        return torch.stack([from_png(data, self.size) for data in files])

    def decoded(self, name: str = "image") -> Tensor:
        """All images, or all of another attribute of PNGs: (N, 3, H, W) or (B, G, 3, H, W) uint8."""
        return torch.stack([self._decode(files) for files in getattr(self, name)])

    def take(self, rows: Sequence[int]) -> Self:
        """Some of them, in the order of `rows`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "size"}
        chosen = {name: [v[i] for i in rows] if isinstance(v, list) else v[list(rows)] for name, v in values.items()}
        return type(self)(**chosen, size=self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that all attributes take."""
        return sum(_nbytes(getattr(self, field.name)) for field in fields(self))


def _nbytes(value: Any) -> int:
    """Bytes of tensors, PNGs and descriptions, of Python's objects as well."""
    if isinstance(value, Tensor):
        return value.untyped_storage().nbytes()
    inside = sum(map(_nbytes, value)) if isinstance(value, list | tuple) else 0
    return sys.getsizeof(value) + inside


def _one_size(records: Sequence[_Record]) -> Size:
    sizes = sorted({record.size for record in records})
    if len(sizes) != 1:
        raise RuntimeError(f"images of {sizes[0]} and {sizes[-1]}")
    return sizes[0]


@dataclass(frozen=True)
class Samples(_Stack):
    """N samples in memory, compact; indexing gives one sample of a batch (see above), with epoch 0.

    Attributes:
        index: (N,) int64, places in the split.
        image: N PNGs.
        label: N PNGs.
        keypoints: (N, P, 18, 3) float32, P the most people in one image, at least 1.
        latent: (N, 2C, h, w) float16, mean then standard deviation.
        prompt: N descriptions.
        size: (H, W) of images and labels.
    """

    index: Tensor
    image: list[bytes]
    label: list[bytes]
    keypoints: Tensor
    latent: Tensor
    prompt: list[str]
    size: Size

    @classmethod
    def stack(cls, samples: Sequence[Sample]) -> Self:
        """Puts samples together; raises RuntimeError where images or latents differ in size."""
        people = [sample.keypoints for sample in samples]
        return cls(
            index=torch.tensor([sample.index for sample in samples]),
            image=[sample.image for sample in samples],
            label=[sample.label for sample in samples],
            keypoints=pad_sequence([*people, torch.zeros(1, 18, 3)], batch_first=True)[:-1],
            latent=torch.stack([sample.latent for sample in samples]),
            prompt=[sample.prompt for sample in samples],
            size=_one_size(samples),
        )


@dataclass(frozen=True)
class Group(_Record):
    """Images that belong together.

    Attributes:
        index: position in its split.
        images: G PNGs, see `to_png`.
        size: (H, W) of all.
        points: (N, G, 3) float32 of (x, y, visible): the same N points of things in every image; N = 0 where nobody
            followed any, else at least one is visible in all images.
        turn: degrees by which the head of a portrait turns out of the image's plane from the first image to the
            second, at least 0; None for anything else.
        latents: (G, 2C, h, w) float16: mean, then standard deviation of the scaled latents.
        prompt, kind, seed, identity: as of rg.data.samples.Sample, of the first image.
    """

    index: int
    images: tuple[bytes, ...]
    size: Size
    points: Tensor
    turn: float | None
    latents: Tensor
    prompt: str
    kind: str
    seed: tuple[int, ...] | None
    identity: list[dict[str, Any]] | None

    def _members(self) -> tuple[dict[str, bytes], dict[str, Any], Tensor]:
        images = {f"{number}.png": image for number, image in enumerate(self.images)}
        meta = {"pictures": len(self.images), "turn": self.turn, "points": self.points.tolist()}
        return images, meta, self.latents.flatten(0, 1)

    @classmethod
    def decode(cls, raw: dict[str, Any], shard: Path) -> Self:
        """Reads what `encode` wrote; `shard` is named in errors. Members of other names are never looked at.

        Raises:
            DataError: a member is missing, unreadable, or of another size or type than the schema says.
        """
        size, words, count, turn, points = read_member(raw, "json", shard, _group_from_json)
        read = partial(_checked, size=size)
        images = tuple(read_member(raw, f"{number}.png", shard, read) for number in range(count))
        latents = read_member(raw, "latent.npy", shard, lambda data: _split(from_npy(data), count))
        return cls(int(raw["__key__"]), images, size, points, turn, latents, *words)


def _group_from_json(data: bytes) -> tuple[Any, ...]:
    meta, size, words = read_words(GroupWords, data)
    for number, point in enumerate(meta.points):
        if len(point) != meta.pictures:
            raise ValueError(f"points.{number}: expected a place in {meta.pictures} images, found {len(point)}")
    points = torch.tensor(meta.points, dtype=torch.float32).reshape(-1, meta.pictures, 3)
    if len(points) and not (points[..., 2] > 0).all(1).any():
        raise ValueError("points: expected at least one that is visible in all images, found none")
    return size, words, meta.pictures, meta.turn, points


def _split(latents: Tensor, count: int) -> Tensor:
    """(count, 2C, h, w) of the latents of `count` images one after the other."""
    if len(latents) % (2 * count):
        raise ValueError(f"expected the latents of {count} images, found {len(latents)} channels")
    return latents.unflatten(0, (count, -1))


@dataclass(frozen=True)
class Groups(_Stack):
    """B groups of G images in memory, compact; indexing gives one group of a batch (see above), with epoch 0.

    Attributes:
        index: (B,) int64, places in the split.
        image: B times G PNGs.
        points: (B, N, G, 3) float32, N the most points of one group.
        turn: (B,) float32, nan where unknown.
        latent: (B, G, 2C, h, w) float16, mean then standard deviation.
        prompt: B descriptions.
        size: (H, W) of all images.
    """

    index: Tensor
    image: list[tuple[bytes, ...]]
    points: Tensor
    turn: Tensor
    latent: Tensor
    prompt: list[str]
    size: Size

    @classmethod
    def stack(cls, groups: Sequence[Group]) -> Self:
        """Puts groups together; raises RuntimeError where they differ in number or size of images or latents."""
        return cls(
            index=torch.tensor([group.index for group in groups]),
            image=[group.images for group in groups],
            points=pad_sequence([group.points for group in groups], batch_first=True),
            turn=torch.tensor([float("nan") if group.turn is None else group.turn for group in groups]),
            latent=torch.stack([group.latents for group in groups]),
            prompt=[group.prompt for group in groups],
            size=_one_size(groups),
        )


# What a manifest calls the records of its shards.
RECORDS: dict[str, type[Sample] | type[Group]] = {"image": Sample, "group": Group}
