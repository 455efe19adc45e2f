"""Pictures that belong together, before they have a label; see data_prep.video_sources and data_prep.look_sources."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SourceGroup:
    """A clip of a video, or other pictures of one thing, of which the first and the last are a pair.

    Attributes:
        name: what messages call it.
        images: (T, 3, resolution, resolution) uint8, RGB, T >= 2, in order.
        prompt: a description of the first picture, or "".
        kind: what the pictures show, in the source's words.
        edit_prompt: what an edit of the first picture shall show; None: `prompt`.
        negatives: (K, 3, resolution, resolution) uint8, pictures known to be unlike the first; None: none are known.
        points: (N, 2, 3) float32 of (x, y, visible) in pixels of the first and the last picture, of rendered things.
        mask: (resolution, resolution) bool, where in the first picture the things are; None: anywhere.
        turn: see rg.groups.Group.
        seed, identity: as of data_prep.sources.SourceSample, of the first picture.
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
