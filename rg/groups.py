"""A group of pictures as one sample: the pair or triplet that a relative head is trained on.

It has the members of rg.samples.Sample but for the pictures, 0.png, 1.png, ..., and latent.npy, which holds the latents
of all of them one after the other; the json has points and turn in place of keypoints.
A batch of groups of G pictures is a dict: image (B, G, 3, H, W) float32 in [-1, 1]; points (B, N, G, 3) float32 of
(x, y, visible) in pixels of each picture, missing points all 0; turn (B,) float32 in degrees, nan where unknown;
latent_mean and latent_std (B, G, C, h, w) float32, scaled latents; prompt, index and draw as in rg.samples.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from rg.samples import Batch, from_npy, from_png, read_member, read_words, to_npy, to_png, write_words


@dataclass(frozen=True)
class Group:
    """Pictures that belong together.

    Attributes:
        index: position in its split.
        images: (G, 3, H, W) uint8, RGB.
        points: (N, G, 3) float32 of (x, y, visible): the same N points of things in every picture; N = 0 where nobody
            followed any, else at least one is visible in all pictures.
        turn: degrees by which the head of a portrait turns out of the picture's plane from the first picture to the
            second, at least 0; None for anything else.
        latents: (G, 2C, h, w) float16: mean, then standard deviation of the scaled latents.
        prompt, kind, seed, identity: as of rg.samples.Sample, of the first picture.
    """

    index: int
    images: Tensor
    points: Tensor
    turn: float | None
    latents: Tensor
    prompt: str
    kind: str
    seed: tuple[int, ...] | None
    identity: list[dict[str, Any]] | None

    def encode(self) -> dict[str, str | bytes]:
        """The group as a webdataset writer takes it: "__key__" and the bytes of each member."""
        meta = write_words(self, self.images)
        meta |= {"pictures": len(self.images), "turn": self.turn, "points": self.points.tolist()}
        pictures = {f"{number}.png": to_png(picture) for number, picture in enumerate(self.images)}
        latent = to_npy(self.latents.flatten(0, 1))
        return {"__key__": f"{self.index:08d}", **pictures, "json": json.dumps(meta).encode(), "latent.npy": latent}

    @classmethod
    def decode(cls, raw: dict[str, Any], shard: Path) -> Self:
        """Reads what `encode` wrote; `shard` is named in errors. Members of other names are never looked at.

        Raises:
            DataError: a member is missing, unreadable, or of another size or type than the schema says.
        """
        size, words, count, turn, points = read_member(raw, "json", shard, _from_json)
        read = partial(from_png, size=size)
        images = [read_member(raw, f"{number}.png", shard, read) for number in range(count)]
        latents = read_member(raw, "latent.npy", shard, lambda data: _split(from_npy(data), count))
        return cls(int(raw["__key__"]), torch.stack(images), points, turn, latents, *words)


def _from_json(data: bytes) -> tuple[Any, ...]:
    meta = json.loads(data)
    turn = None if meta["turn"] is None else float(meta["turn"])
    points = torch.tensor(meta["points"], dtype=torch.float32).reshape(-1, meta["pictures"], 3)
    if len(points) and not (points[..., 2] > 0).all(1).any():
        raise ValueError("expected at least one point that is visible in all pictures, found none")
    return *read_words(meta), meta["pictures"], turn, points


def _split(latents: Tensor, count: int) -> Tensor:
    """(count, 2C, h, w) of the latents of `count` pictures one after the other."""
    if len(latents) % (2 * count):
        raise ValueError(f"expected the latents of {count} pictures, found {len(latents)} channels")
    return latents.unflatten(0, (count, -1))


@dataclass(frozen=True)
class Groups(Dataset[Batch]):
    """B groups of G pictures in memory, compact; indexing gives one group of a batch (see above), with draw 0.

    Attributes:
        index: (B,) int64, places in the split.
        image: (B, G, 3, H, W) uint8.
        points: (B, N, G, 3) float32, N the most points of one group.
        turn: (B,) float32, nan where unknown.
        latent: (B, G, 2C, h, w) float16, mean then standard deviation.
        prompt: B descriptions.
    """

    index: Tensor
    image: Tensor
    points: Tensor
    turn: Tensor
    latent: Tensor
    prompt: list[str]

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, position: int) -> Batch:
        mean, std = self.latent[position].float().chunk(2, 1)
        return {
            "image": self.image[position].float() / 127.5 - 1,
            "points": self.points[position],
            "turn": self.turn[position],
            "latent_mean": mean,
            "latent_std": std,
            "prompt": self.prompt[position],
            "index": self.index[position],
            "draw": 0,
        }

    @classmethod
    def stack(cls, groups: Sequence[Group]) -> Self:
        """Puts groups together; raises RuntimeError where they differ in number or size of pictures or latents."""
        return cls(
            index=torch.tensor([group.index for group in groups]),
            image=torch.stack([group.images for group in groups]),
            points=pad_sequence([group.points for group in groups], batch_first=True),
            turn=torch.tensor([float("nan") if group.turn is None else group.turn for group in groups]),
            latent=torch.stack([group.latents for group in groups]),
            prompt=[group.prompt for group in groups],
        )
