"""Where images come from. A source gives square images by split and index; what it cannot read it skips by name.

A source has `resolution` (the side of its images), `describe(split)` (what decides its images beside its own
arguments: the manifest keeps it), `count(split)` (None: endless) and `read(split, indices)`.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.random import Generator, default_rng
from PIL import Image
from torch import Tensor

from data_prep.cropping import crop_box, crop_image
from data_prep.records import Skip, SourceGroup, SourceSample
from rg.data.samples import SPLITS
from rg.io.files import read_text
from rg.io.folders import natural_key, printable, walk
from rg.io.images import ENDINGS, open_image, open_mask


def split_by_hash(
    names: Sequence[str], *, validation_share: float, test_share: float, seed: int
) -> dict[str, list[str]]:
    """The names of each split, in their order: decided by a seeded hash of a name alone, but for two or more names of
    which none is left to train on, or no other to validate with.

    Raises:
        ValueError: the shares are negative, or more than 1 in sum.
    """
    if min(validation_share, test_share) < 0 or validation_share + test_share > 1:
        shares = f"validation_share={validation_share}, test_share={test_share}"
        raise ValueError(f"expected shares of at least 0 and at most 1 in sum, got {shares}")
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in names:
        draw = int.from_bytes(hashlib.sha256(os.fsencode(f"{seed}/{name}")).digest()[:8], "big") / 2**64
        held_out = "test" if draw < test_share else "val" if draw < test_share + validation_share else "train"
        splits[held_out].append(name)
    if validation_share + test_share < 1:
        # Few names may all be dealt to the held-out splits: one is needed to learn from, another to validate with.
        while len(names) > 1 and (not splits["train"] or len(splits["train"]) + len(splits["val"]) < 2):
            donor = splits["test"] or splits["val"]
            splits["train"] = sorted([*splits["train"], donor.pop()], key=list(names).index)
    return splits


def find_images(key: str, folder: str) -> list[Path]:
    """The image files anywhere below the folder of a setting, in natural order, see rg.io.folders.walk.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{key}={folder}: expected a folder of images, found none")
    files = walk(Path(folder), ENDINGS)
    if not files:
        raise ValueError(f"{key}={folder}: expected images ({', '.join(ENDINGS)}), found none in this folder")
    return files


def check_names(key: str, folder: str, files: Sequence[Path]) -> None:
    """Raises ValueError where two images share the name of one label, as a.jpg and a.png do."""
    first: dict[Path, Path] = {}
    for file in files:
        other = first.setdefault(file.with_suffix(""), file)
        if other is not file:
            names = " and ".join(printable(image.relative_to(folder).as_posix()) for image in (other, file))
            raise ValueError(f"{key}={folder}: expected one image for each name of a label, found {names}: rename one")


def read_prompt(file: Path, otherwise: str | None = None) -> str:
    """The text of a file, where there is none the other or ""; raises ValueError where it cannot be read."""
    return read_text(file).strip() if file.exists() or file.is_symlink() else otherwise or ""


class FolderSource:
    """One's own images, of any of rg.io.images.ENDINGS below a folder, by name, cropped to their centre square.

    An image's split is decided by a seeded hash of its name, so that it stays where it is when others come or go.
    Its prompt is the text of the .txt file of the same name beside it, if there is one.

    Args:
        path: the folder.
        resolution: side of the images in pixels.
        validation_share: of all images, in split "val".
        test_share: of all images, in split "test"; the rest is "train".
        seed: of the hash.
        prompt: of images without a .txt file.

    Raises:
        ValueError: the folder is missing or has no image, two images share a name, or see split_by_hash.
    """

    def __init__(
        self,
        *,
        path: str,
        resolution: int,
        validation_share: float = 0.1,
        test_share: float = 0.1,
        seed: int = 0,
        prompt: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.resolution, self.prompt = resolution, prompt
        files = find_images("pictures.path", path)
        check_names("pictures.path", path, files)
        names = [file.relative_to(self.path).as_posix() for file in files]
        splits = split_by_hash(names, validation_share=validation_share, test_share=test_share, seed=seed)
        self.files = {split: [Path(name) for name in chosen] for split, chosen in splits.items()}

    def describe(self, split: str) -> dict[str, Any]:
        """The crop and the names: another set of images gives the indices another meaning."""
        names = "\n".join(file.as_posix() for file in self.files[split])
        return {"crop": "centre square", "file_names": hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}

    def count(self, split: str) -> int:
        return len(self.files[split])

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]:
        return [self._read(self.files[split][index]) for index in indices]

    def _read(self, file: Path) -> SourceSample | Skip:
        try:
            opened = open_image(self.path / file)
            prompt = read_prompt((self.path / file).with_suffix(".txt"), self.prompt)
        except ValueError as error:
            return Skip(f"{file.as_posix()} cannot be read: {error}")
        image = crop_image(opened, self.resolution)
        return SourceSample(image, prompt, "picture", file=file, original=(opened.height, opened.width))


GAPS = (2, 23)  # frames between the two of a pair, at least and at most


def draw_pair(rng: Generator, frames: int, gaps: tuple[int, int]) -> tuple[int, int]:
    """First and last frame of a pair out of `frames`, more than the least gap."""
    gap = int(rng.integers(gaps[0], min(gaps[1], frames - 1), endpoint=True))
    first = int(rng.integers(frames - gap))
    return first, first + gap


class VideoFolderSource:
    """One's own videos, each a folder of frames whose names sort in order of time; pairs of frames of each.

    A video's split is decided by a seeded hash of its name, its prompt is the text of NAME.txt beside its folder, if
    there is one. Frames are cropped to their centre square. Several images of one person per folder do as well.

    Args:
        path: the folder of the videos.
        resolution: side of the images in pixels.
        masks: folder of the same layout with NAME.png for a frame, black or transparent where there is no object;
            None: objects anywhere.
        pairs: per video.
        gaps: frames from the first to the last of a pair, at least and at most.
        clips: give the frames between the two as well, which a tracker needs.
        validation_share, test_share, seed, prompt: see data_prep.sources.folders.FolderSource.

    Raises:
        ValueError: a folder is missing, there is no image, two frames share a mask, or pairs or gaps are too small.
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
        prompt: str | None = None,
    ) -> None:
        files = self.find(path)
        if masks is not None and not Path(masks).is_dir():
            raise ValueError(f"pictures.masks={masks}: expected a folder of masks, found none")
        if masks is not None:
            check_names("pictures.path", path, files)
        if pairs < 1 or not 1 <= gaps[0] <= gaps[1]:
            raise ValueError(f"expected pairs and gaps of at least 1, gaps in order, got pairs={pairs}, gaps={gaps}")
        self.path, self.masks = Path(path), None if masks is None else Path(masks)
        self.resolution, self.pairs, self.gaps, self.seed = resolution, pairs, gaps, seed
        self.clips, self.prompt = clips, prompt
        self.frames = self.group(files)
        self.videos = split_by_hash(
            sorted(self.frames, key=natural_key), validation_share=validation_share, test_share=test_share, seed=seed
        )

    def find(self, path: str) -> list[Path]:
        """The files below a folder; raises ValueError where there is none."""
        return find_images("pictures.path", path)

    def group(self, files: Sequence[Path]) -> dict[str, list[Path]]:
        """The frames of each video by its name."""
        frames: dict[str, list[Path]] = {}
        for file in files:
            frames.setdefault(file.parent.relative_to(self.path).as_posix(), []).append(file)
        return frames

    def open_frames(self, video: str, numbers: Sequence[int]) -> list[Image.Image]:
        """Some frames of a video; raises ValueError where one cannot be read."""
        return [open_image(self.frames[video][number]) for number in numbers]

    def length(self, video: str) -> int:
        """How many frames a video has; raises ValueError where it cannot be read."""
        return len(self.frames[video])

    def describe(self, split: str) -> dict[str, Any]:
        """The crop and the names: another set of frames gives the indices another meaning."""
        files = (file.relative_to(self.path) for video in self.videos[split] for file in self.frames[video])
        names = "\n".join(file.as_posix() for file in files)
        return {"crop": "centre square", "file_names": hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}

    def count(self, split: str) -> int:
        return len(self.videos[split]) * self.pairs

    def read(self, split: str, indices: Sequence[int]) -> list[SourceGroup | Skip]:
        places = (divmod(index, self.pairs) for index in indices)
        return [self._read(self.videos[split][video], pair) for video, pair in places]

    def _read(self, video: str, pair: int) -> SourceGroup | Skip:
        name = int.from_bytes(hashlib.sha256(os.fsencode(video)).digest()[:8], "big")
        try:
            frames = self.length(video)
            if frames <= self.gaps[0]:
                return Skip(f"{video}: expected more than {self.gaps[0]} frames, found {frames}")
            first, last = draw_pair(default_rng((self.seed, name, pair)), frames, self.gaps)
            clip = self.open_frames(video, range(first, last + 1, 1 if self.clips else last - first))
            mask = None if self.masks is None else self._mask(self.frames[video][first])
            prompt = read_prompt(self.path / f"{video}.txt", self.prompt)
        except ValueError as error:
            return Skip(f"{video}: a frame or mask cannot be read: {error}")
        sizes = sorted({image.size for image in clip})
        if len(sizes) > 1:
            return Skip(f"{video}: expected frames of one size, found {sizes}")
        images = torch.stack([crop_image(image, self.resolution) for image in clip])
        return SourceGroup(f"{video}, frames {first} and {last}", images, prompt, "video", mask=mask)

    def _mask(self, frame: Path) -> Tensor:
        file = (self.masks / frame.relative_to(self.path)).with_suffix(".png")
        objects = open_mask(file)
        left, top, side = crop_box(objects.shape)
        square = objects[top : top + side, left : left + side].astype(np.uint8)
        size = (self.resolution, self.resolution)
        return torch.from_numpy(cv2.resize(square, size, interpolation=cv2.INTER_NEAREST)) > 0
