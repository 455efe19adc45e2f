"""One's own videos as files; OpenCV reads their frames."""

from collections.abc import Sequence
from pathlib import Path

import cv2
from PIL import Image

from data_prep.sources.folders import VideoFolderSource, check_names
from rg.io.files import require_file
from rg.io.folders import walk

ENDINGS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm")
MAX_BYTES = 2**36
# What such files begin with, and at which byte: a list of other files' places, which decoders follow, does not.
BEGINNINGS = ((4, b"ftyp"), (4, b"moov"), (4, b"mdat"), (8, b"AVI "), (0, b"\x1aE\xdf\xa3"))


class VideoFileSource(VideoFolderSource):
    """Videos anywhere below a folder, each one file; pairs of frames of each.

    A video's name is that of its file without the ending, its prompt the text of NAME.txt beside it. Each pair is read
    from the beginning of its file: long recordings are better cut into clips first.

    Args:
        path: the folder.
        prompt, resolution, pairs, gaps, clips, validation_share, test_share, seed: see VideoFolderSource.
        masks: must be None.

    Raises:
        ValueError: the folder is missing or has no video, two share a name, masks are given, or see VideoFolderSource.
    """

    def find(self, path: str) -> list[Path]:
        """The files of videos below a folder, in natural order."""
        files = walk(Path(path), ENDINGS) if Path(path).is_dir() else []
        if not files:
            raise ValueError(f"pictures.path={path}: expected videos ({', '.join(ENDINGS)}), found none in this folder")
        check_names("pictures.path", path, files)
        return files

    def group(self, files: Sequence[Path]) -> dict[str, list[Path]]:
        """The file of each video by its name."""
        if self.masks is not None:
            raise ValueError(f"pictures.masks={self.masks}: expected none with videos as files")
        return {file.relative_to(self.path).with_suffix("").as_posix(): [file] for file in files}

    def length(self, video: str) -> int:
        """See VideoFolderSource."""
        return int(_open(self.frames[video][0]).get(cv2.CAP_PROP_FRAME_COUNT))

    def open_frames(self, video: str, numbers: Sequence[int]) -> list[Image.Image]:
        """See VideoFolderSource."""
        reader, images = _open(self.frames[video][0]), []
        for number in range(numbers[-1] + 1):
            if not reader.grab():
                raise ValueError(f"expected {numbers[-1] + 1} frames, found {number}")
            if number in numbers:
                images.append(Image.fromarray(cv2.cvtColor(reader.retrieve()[1], cv2.COLOR_BGR2RGB)))
        return images


def _open(file: Path) -> cv2.VideoCapture:
    require_file(file, MAX_BYTES)
    with file.open("rb") as stream:
        start = stream.read(16)
    reader = cv2.VideoCapture()
    known = any(start[place : place + len(mark)] == mark for place, mark in BEGINNINGS)
    if not known or not reader.open(str(file)):
        raise ValueError(f"{file}: expected a video ({', '.join(ENDINGS)}), found something else")
    return reader
