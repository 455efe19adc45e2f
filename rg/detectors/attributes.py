"""A network that reads what an image shows, attribute by attribute, and knows nothing of prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.detectors.hourglass import Hourglass

PATCH = 2  # pixels of a cell; glasses are hardly wider
SECOND = "second_"  # what the attributes of the right one of two people begin with


class AttributeClassifier(Hourglass):
    """Reads every attribute where it is: one attention map per attribute over a common trunk's features.

    What an attribute attends to depends on the whole image: the shirt of the left one of two people, for instance.

    Args:
        attributes: name -> classes of everything that can be read.
        widths: channels at 1/2, 1/4 and 1/8 of the resolution, multiples of 8.
        key_width: channels of the keys and queries of attention.
    """

    def __init__(self, *, attributes: Mapping[str, Sequence[str]], widths: Sequence[int], key_width: int = 32) -> None:
        super().__init__(widths, PATCH)
        self.attributes = {name: tuple(classes) for name, classes in attributes.items()}
        self.key_width = key_width
        fine, _, coarse = widths
        self.keys = nn.Conv2d(fine + 2, key_width, 1)
        self.values = nn.Conv2d(fine, coarse, 1)
        self.queries = nn.Linear(coarse, len(attributes) * key_width)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * coarse, len(classes)) for name, classes in self.attributes.items()}
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        attributes = {name: list(classes) for name, classes in self.attributes.items()}
        return {"attributes": attributes, "widths": list(self.widths), "key_width": self.key_width}

    def attention(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where each attribute is read: maps (B, A, h, w) that sum to 1, the features (B, C, h, w), their mean (B, C).

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of 8; h = H / 2, w = W / 2.
        """
        fine, coarse = self.features(images)
        h, w = fine.shape[-2:]
        rows, columns = (torch.linspace(-1, 1, n, device=fine.device).to(fine.dtype) for n in (h, w))
        places = torch.stack(torch.meshgrid(columns, rows, indexing="xy")).expand(len(images), -1, -1, -1)
        keys = self.keys(torch.cat([fine, places], 1)).flatten(2)
        overview = coarse.mean((2, 3))
        queries = self.queries(overview).unflatten(1, (-1, self.key_width))
        maps = (queries @ keys / self.key_width**0.5).float().softmax(-1).unflatten(-1, (h, w))
        return maps, F.silu(self.values(fine)), overview

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, classes) of every attribute, those that do not apply included.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of 8.

        Raises:
            ValueError: images of another shape.
        """
        return self.answer(*self.attention(images))

    def answer(self, maps: Tensor, values: Tensor, overview: Tensor) -> dict[str, Tensor]:
        """The logits of what `attention` returns."""
        seen = maps.to(values.dtype).flatten(2) @ values.flatten(2).mT
        seen = torch.cat([seen, overview[:, None].expand(-1, seen.shape[1], -1)], -1)
        return {name: head(seen[:, i]).float() for i, (name, head) in enumerate(self.heads.items())}

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Probabilities (B, classes) of every attribute, those that do not apply included."""
        return {name: logits.softmax(-1) for name, logits in self(images).items()}

    @torch.no_grad()
    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The likeliest class of every attribute that applies, by the classifier's own count of people.

        Of one person there is no second one; a portrait shows neither ground nor trousers.
        """
        numbers = {name: logits.argmax(-1).tolist() for name, logits in self(images).items()}
        words = [
            {name: self.attributes[name][numbers[name][i]] for name in self.attributes} for i in range(len(images))
        ]
        return [{name: value for name, value in row.items() if _applies(name, row)} for row in words]


def _applies(name: str, row: Mapping[str, str]) -> bool:
    if name.startswith(SECOND):
        return row.get("people") == "two"
    return not (name in ("ground", "trousers") and row.get("portrait") == "yes")
