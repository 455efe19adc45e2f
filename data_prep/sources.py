"""Where pictures come from. A source gives square pictures by split and index; what it cannot read it skips by name.

A source has `resolution` (the side of its pictures), `describe(split)` (what decides its pictures beside its own
arguments: the manifest keeps it), `count(split)` (None: endless) and `read(split, indices)`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from data_prep.marionette import KINDS, VERSION, render
from data_prep.pictures import ENDINGS, crop_picture
from rg.pictures import UNREADABLE, open_picture
from rg.points import Size
from rg.samples import SPLITS


@dataclass(frozen=True)
class Skip:
    """An index without a sample, and why."""

    reason: str


@dataclass(frozen=True)
class SourceSample:
    """A picture before it has a label.

    Attributes:
        image: (3, resolution, resolution) uint8, RGB.
        prompt: a description, or "".
        kind: what the picture shows, in the source's words.
        seed: the seed sequence of a generated picture.
        identity: the attributes of each person, of a generated picture.
        keypoints: (P, 18, 3) float32 of (x, y, visible) in pixels of `image`, of a generated picture.
        depth, edges: (resolution, resolution) as in data_prep.marionette.Stills, of a generated picture.
        file: the picture's path relative to its folder, of a picture that was read.
        original: (height, width) of that file's picture before crop and resize.
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
        return f"the picture of seed {self.seed}" if self.file is None else self.file.as_posix()


class Source(Protocol):
    """See the module's docstring."""

    resolution: int

    def describe(self, split: str) -> dict[str, Any]: ...

    def count(self, split: str) -> int | None: ...

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]: ...


def deal(names: Sequence[str], *, validation_share: float, test_share: float, seed: int) -> dict[str, list[str]]:
    """The names of each split, in their order: decided by a seeded hash of a name alone.

    Raises:
        ValueError: the shares are negative, or more than 1 in sum.
    """
    if min(validation_share, test_share) < 0 or validation_share + test_share > 1:
        shares = f"validation_share={validation_share}, test_share={test_share}"
        raise ValueError(f"expected shares of at least 0 and at most 1 in sum, got {shares}")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        draw = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") / 2**64
        held_out = "test" if draw < test_share else "val" if draw < test_share + validation_share else "train"
        splits[held_out].append(name)
    return splits


class MarionetteSource:
    """Endless renders of jointed people; the picture at an index depends on (seed, split, index) alone.

    Args:
        seed: of the world.
        resolution: side of the pictures in pixels.
        kinds: probabilities of the kinds of scene, keys of data_prep.marionette.KINDS.
    """

    def __init__(self, *, seed: int = 0, resolution: int = 64, kinds: Mapping[str, float] = KINDS) -> None:
        self.seed = seed
        self.resolution = resolution
        self.kinds = dict(kinds)

    def describe(self, split: str) -> dict[str, Any]:
        return {"crop": "none", "world": VERSION}

    def count(self, split: str) -> None:
        return None

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]:
        seeds = [(self.seed, SPLITS.index(split), index) for index in indices]
        stills = render(seeds, resolution=self.resolution, kinds=self.kinds)
        return [
            SourceSample(
                image=stills.image[row],
                prompt=stills.prompt[row],
                kind=stills.kind[row],
                seed=seed,
                identity=stills.identity[row],
                keypoints=stills.keypoints[row, : len(stills.identity[row])],
                depth=stills.depth[row],
                edges=stills.edges[row],
            )
            for row, seed in enumerate(seeds)
        ]


class FolderSource:
    """One's own pictures: every jpg, png or webp below a folder, sorted by name, cropped to their centre square.

    A picture's split is decided by a seeded hash of its name, so that it stays where it is when others come or go.
    Its prompt is the text of the .txt file of the same name beside it, if there is one.

    Args:
        path: the folder.
        resolution: side of the pictures in pixels.
        validation_share: of all pictures, in split "val".
        test_share: of all pictures, in split "test"; the rest is "train".
        seed: of the hash.
    """

    def __init__(
        self, *, path: str, resolution: int, validation_share: float = 0.1, test_share: float = 0.1, seed: int = 0
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ValueError(f"expected a folder of pictures, found none at path={path}")
        self.resolution = resolution
        files = (file.relative_to(self.path) for file in self.path.rglob("*") if file.suffix.lower() in ENDINGS)
        names = sorted(file.as_posix() for file in files)
        splits = deal(names, validation_share=validation_share, test_share=test_share, seed=seed)
        self.files = {split: [Path(name) for name in dealt] for split, dealt in splits.items()}

    def describe(self, split: str) -> dict[str, Any]:
        """The crop and the names: another set of pictures gives the indices another meaning."""
        names = "\n".join(file.as_posix() for file in self.files[split])
        return {"crop": "centre square", "file_names": hashlib.sha256(names.encode()).hexdigest()[:16]}

    def count(self, split: str) -> int:
        return len(self.files[split])

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]:
        return [self._read(self.files[split][index]) for index in indices]

    def _read(self, file: Path) -> SourceSample | Skip:
        words = (self.path / file).with_suffix(".txt")
        try:
            picture = open_picture(self.path / file)
            prompt = words.read_text(encoding="utf-8").strip() if words.is_file() else ""
        except UNREADABLE as error:
            return Skip(f"{file.as_posix()} cannot be read: {error}")
        image = crop_picture(picture, self.resolution)
        return SourceSample(image, prompt, "picture", file=file, original=(picture.height, picture.width))
