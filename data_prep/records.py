"""What passes through preparation: images and groups of them before they have a label, labels, and who gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rg.data.samples import Group, Sample, to_png
from rg.io.folders import printable
from rg.points import Size


@dataclass(frozen=True)
class Skip:
    """An index without a sample, and why."""

    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", printable(self.reason))  # it may name a file


@dataclass(frozen=True)
class SourceSample:
    """An image before it has a label.

    Attributes:
        image: (3, resolution, resolution) uint8, RGB.
        prompt: a description, or "".
        kind: what the image shows, in the source's words.
        seed: the seed sequence of a generated image.
        identity: the attributes of each person, of a generated image.
        keypoints: (P, 18, 3) float32 of (x, y, visible) in pixels of `image`, of a generated image.
        depth, edges: (resolution, resolution) as in data_prep.marionette.render.Stills, of a generated image.
        file: the image's path relative to its folder, of an image that was read.
        original: (height, width) of that file's image before crop and resize.
    """

    image: Tensor
    prompt: str
    kind: str
    seed: tuple[int, ...] | None = None
    identity: list[dict[str, Any]] | None = None
    keypoints: Tensor | None = None
    depth: Tensor | None = None
    edges: Tensor | None = None
    file: Path | None = None
    original: Size | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"the image of seed {self.seed}" if self.file is None else self.file.as_posix()


@dataclass(frozen=True)
class SourceGroup:
    """A clip of a video, or other images of one thing, of which the first and the last are a pair.

    Attributes:
        name: what messages call it.
        images: (T, 3, resolution, resolution) uint8, RGB, T >= 2, in order.
        prompt: a description of the first image, or "".
        kind: what the images show, in the source's words.
        edit_prompt: what an edit of the first image shall show; None: `prompt`.
        negatives: (K, 3, resolution, resolution) uint8, images known to be unlike the first; None: none are known.
        points: (N, 2, 3) float32 of (x, y, visible) in pixels of the first and the last image, of rendered things.
        mask: (resolution, resolution) bool, where in the first image the things are; None: anywhere.
        turn: see rg.data.samples.Group.
        seed, identity: as of data_prep.records.SourceSample, of the first image.
    """

    name: str
    images: Tensor
    prompt: str
    kind: str
    edit_prompt: str | None = None
    negatives: Tensor | None = None
    points: Tensor | None = None
    mask: Tensor | None = None
    turn: float | None = None
    seed: tuple[int, ...] | None = None
    identity: list[dict[str, Any]] | None = None


class Source(Protocol):
    """See the module's docstring."""

    resolution: int

    def describe(self, split: str) -> dict[str, Any]: ...

    def count(self, split: str) -> int | None: ...

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]: ...


@dataclass(frozen=True)
class Label:
    """What an image is labelled with.

    Attributes:
        image: (3, H, W) uint8, RGB, of the image's size.
        keypoints: (P, 18, 3) float32 of (x, y, visible) in pixels of the image; P = 0 where there are none.
    """

    image: Tensor
    keypoints: Tensor

    def to_encode(self, item: SourceSample) -> Tensor:
        """What the autoencoder encodes: (1, 3, H, W) uint8."""
        return item.image[None]

    def sample(self, index: int, item: SourceSample, latents: Tensor) -> Sample:
        """The sample that is stored; latents: (1, 2C, h, w)."""
        size = (item.image.shape[1], item.image.shape[2])
        image, label = to_png(item.image), to_png(self.image)
        return Sample(index, image, label, size, self.keypoints, latents[0], *_words(item))


@dataclass(frozen=True)
class GroupLabel:
    """The images of a group that are kept, and points that are the same in all of them.

    Attributes:
        images: (G, 3, H, W) uint8, RGB.
        points: (N, G, 3) float32 of (x, y, visible) in pixels of each; N = 0 where nobody followed any.
    """

    images: Tensor
    points: Tensor

    def to_encode(self, item: SourceGroup) -> Tensor:
        """What the autoencoder encodes: (G, 3, H, W) uint8."""
        return self.images

    def sample(self, index: int, item: SourceGroup, latents: Tensor) -> Group:
        """The group that is stored; latents: (G, 2C, h, w)."""
        size = (self.images.shape[2], self.images.shape[3])
        images = tuple(to_png(image) for image in self.images)
        return Group(index, images, size, self.points, item.turn, latents, *_words(item))


def _words(item: SourceSample | SourceGroup) -> tuple[Any, ...]:
    return item.prompt, item.kind, item.seed, item.identity


class Annotator(Protocol):
    """Labels samples: one label or Skip for each. One that needs the model has `attach_backbone(backbone)` too."""

    def annotate(
        self, samples: Sequence[SourceSample] | Sequence[SourceGroup]
    ) -> list[Label | Skip] | list[GroupLabel | Skip]: ...
