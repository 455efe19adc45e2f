"""Public data sets in the layouts of their archives: PascalVOC 2012, MSCOCO 2017, DAVIS 2017 and CelebA-HQ.

None is downloaded: their pages ask for a form or a click, and docs/data.md says what each allows.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from numpy.random import default_rng
from PIL import Image

from data_prep.annotators.pose.people import from_coco
from data_prep.cropping import crop_points
from data_prep.records import Skip, SourceSample
from data_prep.sources.folders import FolderSource, VideoFolderSource
from rg.data.samples import SPLITS
from rg.io.files import read_json, read_text

MAX_BYTES = 2**28


@dataclass(frozen=True)
class Layout:
    """A data set's folder.

    Attributes:
        name: of the data set.
        page: where it is to be had.
        tree: files and folders that must be there, relative to its folder.
        inside: where an archive puts that folder.
        command: makes labels of it.
    """

    name: str
    page: str
    tree: tuple[str, ...]
    inside: tuple[str, ...]
    command: str

    def find(self, path: str) -> Path:
        """The data set's folder, which is `path` or where the archive puts it below; raises ValueError without one."""
        places = [Path(path, *Path(name).parts) for name in ("", *self.inside)]
        for place in places:
            if all((place / name).exists() for name in self.tree):
                return place
        missing = [name for name in self.tree if not (Path(path) / name).exists()]
        raise ValueError(
            f"pictures.path={path}: expected {self.name} with {', '.join(self.tree)}, found no {missing[0]}: "
            f"get it at {self.page}, unpack it, and go on with: python -m data_prep.prepare {self.command}"
        )


VOC_LAYOUT = Layout(
    "PascalVOC 2012",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    ("JPEGImages", "Annotations", "ImageSets/Main"),
    ("VOC2012", "VOCdevkit/VOC2012"),
    "data=pose pictures=voc pictures.path=FOLDER",
)
COCO_LAYOUT = Layout(
    "MSCOCO 2017",
    "https://cocodataset.org/#download",
    ("val2017", "annotations/person_keypoints_val2017.json"),
    (),
    "data=pose pictures=coco pictures.path=FOLDER split=test",
)
DAVIS_LAYOUT = Layout(
    "DAVIS 2017 (480p)",
    "https://davischallenge.org/davis2017/code.html",
    ("JPEGImages/480p", "Annotations/480p"),
    ("DAVIS",),
    "data=correspondence pictures=davis pictures.path=FOLDER",
)
CELEBA_LAYOUT = Layout(
    "CelebA-HQ",
    "https://github.com/switchablenorms/CelebAMask-HQ and, for identity_CelebA.txt, "
    "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ("CelebA-HQ-img", "CelebA-HQ-to-CelebA-mapping.txt", "identity_CelebA.txt"),
    ("CelebAMask-HQ",),
    "data=identity pictures=celeba_hq pictures.path=FOLDER",
)


def shuffled(names: Sequence[Path], seed: int) -> list[Path]:
    """Names in an order that is random and does not depend on the others: the first n are a sample of all."""
    return sorted(names, key=lambda name: hashlib.sha256(os.fsencode(f"{seed}:{name.as_posix()}")).digest())


class VOC(FolderSource):
    """All images of PascalVOC 2012, 17,125 of them, in random order.

    Args:
        path: the folder of the data set, or one that it was unpacked in.
        settings: see data_prep.sources.folders.FolderSource.

    Raises:
        ValueError: something of the layout is missing, or see FolderSource.
    """

    def __init__(self, *, path: str, **settings: Any) -> None:
        super().__init__(path=str(VOC_LAYOUT.find(path) / "JPEGImages"), **settings)
        self.files = {split: shuffled(files, settings.get("seed", 0)) for split, files in self.files.items()}


class COCO(FolderSource):
    """Random validation images of MSCOCO 2017 that show people, with their keypoints; all are of split "test".

    A keypoint is visible where the data set says so, not where it was only guessed. The prompt is an image's first
    caption, where annotations/captions_val2017.json is there.

    Args:
        path: the folder of the data set.
        images: how many.
        seed: of the choice.
        settings: see data_prep.sources.folders.FolderSource; the shares are not used.

    Raises:
        ValueError: something of the layout is missing or damaged, or fewer images show people.
    """

    def __init__(self, *, path: str, images: int = 100, seed: int = 0, **settings: Any) -> None:
        root = COCO_LAYOUT.find(path)
        super().__init__(path=str(root / "val2017"), seed=seed, **settings)
        records = root / "annotations/person_keypoints_val2017.json"
        self.people = _people(records)
        known = {file for files in self.files.values() for file in files}
        shown = sorted(name for name in self.people if Path(name) in known)
        if len(shown) < images:
            raise ValueError(
                f"pictures.images={images}: expected as many images of people in {root}, found {len(shown)}"
            )
        chosen = default_rng(seed).permutation(len(shown))[:images]
        self.files = {split: [] for split in SPLITS} | {"test": [Path(shown[place]) for place in chosen]}
        captions = root / "annotations/captions_val2017.json"
        self.captions = _captions(captions) if captions.is_file() else {}

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]:
        return [self._add(sample) for sample in super().read(split, indices)]

    def _add(self, sample: SourceSample | Skip) -> SourceSample | Skip:
        if isinstance(sample, Skip):
            return sample
        keypoints = crop_points(self.people[sample.file.name], sample.original, self.resolution)
        prompt = sample.prompt or self.captions.get(sample.file.name, "")
        return replace(sample, keypoints=keypoints, prompt=prompt)


def _people(path: Path) -> dict[str, torch.Tensor]:
    """The keypoints (P, 18, 3) of the people in each image that shows some, by the image's file name."""
    record, people = read_json(path, limit=MAX_BYTES), {}
    try:
        names = {image["id"]: image["file_name"] for image in record["images"]}
        for person in record["annotations"]:
            if person["num_keypoints"] and not person["iscrowd"]:
                points = torch.tensor(person["keypoints"], dtype=torch.float32).view(17, 3)
                points[:, 2] = (points[:, 2] == 2).float()
                people.setdefault(names[person["image_id"]], []).append(points)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected keypoints of MSCOCO, found {error!r}") from error
    return {name: from_coco(torch.stack(points)) for name, points in people.items()}


def _captions(path: Path) -> dict[str, str]:
    record, captions = read_json(path, limit=MAX_BYTES), {}
    try:
        names = {image["id"]: image["file_name"] for image in record["images"]}
        for entry in record["annotations"]:
            captions.setdefault(names[entry["image_id"]], " ".join(entry["caption"].split()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected captions of MSCOCO, found {error!r}") from error
    return captions


class DAVIS(VideoFolderSource):
    """The videos of DAVIS 2017 at 480p, with the masks of their objects.

    Args:
        path: the folder of the data set, or one that it was unpacked in.
        masks: None takes the data set's own.
        settings: see data_prep.sources.folders.VideoFolderSource.

    Raises:
        ValueError: something of the layout is missing, or see VideoFolderSource.
    """

    def __init__(self, *, path: str, masks: str | None = None, **settings: Any) -> None:
        root = DAVIS_LAYOUT.find(path)
        super().__init__(path=str(root / "JPEGImages/480p"), masks=masks or str(root / "Annotations/480p"), **settings)


# Left, top, right and bottom of the face in shares of an image: all are aligned by eyes and mouth.
FACE = (0.2, 0.28, 0.8, 0.88)


class CelebAHQ(VideoFolderSource):
    """The faces of CelebA-HQ, cropped tightly, by the person that they show; who is shown once is left out.

    Args:
        path: the folder of the data set, with identity_CelebA.txt of CelebA in it.
        settings: see data_prep.sources.folders.VideoFolderSource; gaps must be able to be 1.

    Raises:
        ValueError: something of the layout is missing or damaged, or nobody is shown twice.
    """

    def __init__(self, *, path: str, **settings: Any) -> None:
        self.root = CELEBA_LAYOUT.find(path)
        super().__init__(path=str(self.root / "CelebA-HQ-img"), **settings)

    def group(self, files: Sequence[Path]) -> dict[str, list[Path]]:
        """The images of each person by the number of CelebA."""
        people = _table(self.root / "identity_CelebA.txt", name=0, value=1)
        originals = _table(self.root / "CelebA-HQ-to-CelebA-mapping.txt", name=0, value=2)
        shown: dict[str, list[Path]] = {}
        for file in files:
            if person := people.get(originals.get(file.stem, "")):
                shown.setdefault(person, []).append(file)
        shown = {person: images for person, images in shown.items() if len(images) > 1}
        if not shown:
            raise ValueError(f"pictures.path={self.root}: expected people with two images or more, found none")
        return shown

    def open_frames(self, video: str, numbers: Sequence[int]) -> list[Image.Image]:
        """See VideoFolderSource."""
        images = super().open_frames(video, numbers)
        return [
            image.crop([round(share * side) for share, side in zip(FACE, image.size * 2, strict=True)])
            for image in images
        ]


def _table(path: Path, name: int, value: int) -> dict[str, str]:
    """Two columns of a text file, by the first."""
    rows = [line.split() for line in read_text(path, MAX_BYTES).splitlines() if line.strip()]
    short = next((row for row in rows if len(row) <= max(name, value)), None)
    if short is not None:
        raise ValueError(f"{path}: expected lines of {max(name, value) + 1} words, found {' '.join(short)!r}")
    return {row[name]: row[value] for row in rows}
