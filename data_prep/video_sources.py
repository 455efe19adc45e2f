"""Where pairs of frames come from: rendered videos, and folders of frames such as DAVIS's."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import Generator, SeedSequence, default_rng
from PIL import Image
from torch import Tensor

from data_prep.groups import SourceGroup
from data_prep.marionette import KINDS, VERSION
from data_prep.marionette.scene import Scene
from data_prep.marionette.videos import draw_video, film
from data_prep.pictures import ENDINGS, crop_box, crop_picture
from data_prep.sources import Skip, deal
from rg.pictures import UNREADABLE, open_picture
from rg.samples import SPLITS

GAPS = (2, 23)  # frames between the two of a pair, at least and at most
PAIR_STREAM = 0xFA125  # keeps the draw of a pair apart from that of its video


def draw_pair(rng: Generator, frames: int, gaps: tuple[int, int]) -> tuple[int, int]:
    """First and last frame of a pair out of `frames`, more than the least gap."""
    gap = int(rng.integers(gaps[0], min(gaps[1], frames - 1), endpoint=True))
    first = int(rng.integers(frames - gap))
    return first, first + gap


def draw_clip(seed: tuple[int, ...], kinds: Mapping[str, float]) -> list[Scene]:
    """The scenes from the first to the last frame of a pair in the video of `seed`."""
    first, last = draw_pair(default_rng(SeedSequence((PAIR_STREAM, *seed))), GAPS[1] + 1, GAPS)
    return draw_video(seed, GAPS[1] + 1, kinds)[first : last + 1]


def head_turn(first: Scene, last: Scene) -> float | None:
    """Degrees by which the first person's head turns sideways before the camera; None where it is no portrait."""
    if first.kind != "portrait":
        return None
    one, other = (
        scene.people[0].pose["yaw"] + scene.people[0].pose["head_yaw"] - scene.camera.yaw for scene in (first, last)
    )
    return abs(math.degrees(other - one))


class MarionettePairs:
    """Endless rendered videos, of each a pair of frames, with exact tracks of points on the people's surfaces.

    Args:
        seed: of the world; the pair at an index depends on (seed, split, index) alone.
        resolution: side of the pictures in pixels.
        kinds: probabilities of the kinds of scene, keys of data_prep.marionette.KINDS.
        points: how many are followed, on what is seen in one of the two frames at least.
        clips: give the frames between the two as well, which a tracker needs.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        resolution: int = 64,
        kinds: Mapping[str, float] = KINDS,
        points: int = 96,
        clips: bool = False,
    ) -> None:
        self.seed, self.resolution, self.kinds = seed, resolution, dict(kinds)
        self.points, self.clips = points, clips

    def describe(self, split: str) -> dict[str, Any]:
        return {"crop": "none", "world": VERSION}

    def count(self, split: str) -> None:
        return None

    def read(self, split: str, indices: Sequence[int]) -> list[SourceGroup | Skip]:
        return [self._read((self.seed, SPLITS.index(split), index)) for index in indices]

    def _read(self, seed: tuple[int, ...]) -> SourceGroup | Skip:
        scenes = draw_clip(seed, self.kinds)
        scenes = scenes if self.clips else [scenes[0], scenes[-1]]
        try:
            made = film(scenes, seed=seed, points=self.points, resolution=self.resolution)
        except ValueError as error:
            return Skip(str(error))
        points = torch.cat([made.tracks[0], made.visible[0, ..., None]], -1)
        return SourceGroup(
            name=f"video of seed {seed}",
            images=made.stills.image,
            prompt=made.stills.prompt[0],
            kind=made.stills.kind[0],
            points=points[[0, -1]].transpose(0, 1),
            mask=made.stills.instances[0] > 0,
            turn=head_turn(scenes[0], scenes[-1]),
            seed=seed,
            identity=made.stills.identity[0],
        )


class VideoFolderSource:
    """One's own videos, each a folder of frames whose names sort in order of time; pairs of frames of each.

    A video's split is decided by a seeded hash of its name, its prompt is the text of NAME.txt beside its folder, if
    there is one. Frames are cropped to their centre square. Several pictures of one person per folder do as well.

    Args:
        path: the folder of the videos.
        resolution: side of the pictures in pixels.
        masks: folder of the same layout with NAME.png for a frame, 0 where there is no object; None: objects anywhere.
        pairs: per video.
        gaps: frames from the first to the last of a pair, at least and at most.
        clips: give the frames between the two as well, which a tracker needs.
        validation_share, test_share, seed: see data_prep.sources.FolderSource.
    """

    def __init__(
        self,
        *,
        path: str,
        resolution: int,
        masks: str | None = None,
        pairs: int = 50,
        gaps: tuple[int, int] = GAPS,
        clips: bool = False,
        validation_share: float = 0.1,
        test_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        for name, folder in (("path", path), ("masks", masks)):
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"expected a folder, found none at {name}={folder}")
        if pairs < 1 or not 1 <= gaps[0] <= gaps[1]:
            raise ValueError(f"expected pairs and gaps of at least 1, gaps in order, got pairs={pairs}, gaps={gaps}")
        self.path, self.masks = Path(path), None if masks is None else Path(masks)
        self.resolution, self.pairs, self.gaps, self.seed = resolution, pairs, gaps, seed
        self.clips = clips
        self.frames: dict[str, list[Path]] = {}
        for file in sorted(file for file in self.path.rglob("*") if file.suffix.lower() in ENDINGS):
            self.frames.setdefault(file.parent.relative_to(self.path).as_posix(), []).append(file)
        self.videos = deal(sorted(self.frames), validation_share=validation_share, test_share=test_share, seed=seed)

    def describe(self, split: str) -> dict[str, Any]:
        """The crop and the names: another set of frames gives the indices another meaning."""
        files = (file.relative_to(self.path) for video in self.videos[split] for file in self.frames[video])
        names = "\n".join(file.as_posix() for file in files)
        return {"crop": "centre square", "file_names": hashlib.sha256(names.encode()).hexdigest()[:16]}

    def count(self, split: str) -> int:
        return len(self.videos[split]) * self.pairs

    def read(self, split: str, indices: Sequence[int]) -> list[SourceGroup | Skip]:
        places = (divmod(index, self.pairs) for index in indices)
        return [self._read(self.videos[split][video], pair) for video, pair in places]

    def _read(self, video: str, pair: int) -> SourceGroup | Skip:
        frames = self.frames[video]
        if len(frames) <= self.gaps[0]:
            return Skip(f"{video}: expected more than {self.gaps[0]} frames, found {len(frames)}")
        name = int.from_bytes(hashlib.sha256(video.encode()).digest()[:8], "big")
        first, last = draw_pair(default_rng((self.seed, name, pair)), len(frames), self.gaps)
        words = self.path / f"{video}.txt"
        try:
            step = 1 if self.clips else last - first
            clip = [open_picture(frame) for frame in frames[first : last + 1 : step]]
            mask = None if self.masks is None else self._mask(frames[first])
            prompt = words.read_text(encoding="utf-8").strip() if words.is_file() else ""
        except UNREADABLE as error:
            return Skip(f"{video}: a frame or mask cannot be read: {error}")
        sizes = sorted({picture.size for picture in clip})
        if len(sizes) > 1:
            return Skip(f"{video}: expected frames of one size, found {sizes}")
        images = torch.stack([crop_picture(picture, self.resolution) for picture in clip])
        return SourceGroup(f"{video}, frames {first} and {last}", images, prompt, "video", mask=mask)

    def _mask(self, frame: Path) -> Tensor:
        file = (self.masks / frame.relative_to(self.path)).with_suffix(".png")
        with Image.open(file) as picture:
            objects = np.asarray(picture) != 0
        objects = objects if objects.ndim == 2 else objects.any(-1)
        left, top, side = crop_box(objects.shape)
        square = objects[top : top + side, left : left + side].astype(np.uint8)
        size = (self.resolution, self.resolution)
        return torch.from_numpy(cv2.resize(square, size, interpolation=cv2.INTER_NEAREST)) > 0
