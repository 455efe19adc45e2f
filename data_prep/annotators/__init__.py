"""Labels for pictures: an annotator turns source samples into labels, or says why one has none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from data_prep.groups import SourceGroup
from data_prep.sources import Skip, SourceSample
from rg.groups import Group
from rg.samples import Sample


@dataclass(frozen=True)
class Label:
    """What a picture is labelled with.

    Attributes:
        picture: (3, H, W) uint8, RGB, of the image's size.
        keypoints: (P, 18, 3) float32 of (x, y, visible) in pixels of the image; P = 0 where there are none.
    """

    picture: Tensor
    keypoints: Tensor

    def pictures(self, item: SourceSample) -> Tensor:
        """What the autoencoder encodes: (1, 3, H, W) uint8."""
        return item.image[None]

    def sample(self, index: int, item: SourceSample, latents: Tensor) -> Sample:
        """The sample that is stored; latents: (1, 2C, h, w)."""
        return Sample(index, item.image, self.picture, self.keypoints, latents[0], *_words(item))


@dataclass(frozen=True)
class GroupLabel:
    """The pictures of a group that are kept, and points that are the same in all of them.

    Attributes:
        images: (G, 3, H, W) uint8, RGB.
        points: (N, G, 3) float32 of (x, y, visible) in pixels of each; N = 0 where nobody followed any.
    """

    images: Tensor
    points: Tensor

    def pictures(self, item: SourceGroup) -> Tensor:
        """What the autoencoder encodes: (G, 3, H, W) uint8."""
        return self.images

    def sample(self, index: int, item: SourceGroup, latents: Tensor) -> Group:
        """The group that is stored; latents: (G, 2C, h, w)."""
        return Group(index, self.images, self.points, item.turn, latents, *_words(item))


def _words(item: SourceSample | SourceGroup) -> tuple[Any, ...]:
    return item.prompt, item.kind, item.seed, item.identity


class Annotator(Protocol):
    """Labels samples: one label or Skip for each. One that needs the model has `attach_backbone(backbone)` too."""

    def annotate(
        self, samples: Sequence[SourceSample] | Sequence[SourceGroup]
    ) -> list[Label | Skip] | list[GroupLabel | Skip]: ...
