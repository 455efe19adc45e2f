"""Labels that someone has made already, as files named after the images."""

from collections.abc import Sequence
from pathlib import Path

import torch

from data_prep.cropping import crop_image, crop_points
from data_prep.records import Label, Skip, SourceSample
from rg.io.images import open_image
from rg.io.keypoints import Pose, read_pose, to_tensor
from rg.points import draw_skeletons


class FileLabels:
    """Reads the label of image a/b.jpg from <path>/a/b.png, its keypoints from <path>/a/b.json, or one of the two.

    The PNG has the size of the image. The JSON is {"keypoints": P people x 18 x [x, y, visible]} in pixels of the
    image, see rg.io.keypoints. Both are cropped and resized as the image is. Without a PNG the skeleton is drawn from
    the JSON.

    Args:
        path: the folder of the labels.
        line_width: thickness of a limb that is drawn, in pixels of the resized image; None draws nothing: there must
            be a PNG, as for depth and edges.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, *, path: str | None, line_width: float | None = 2.0) -> None:
        self.path = Path(path or "")
        if path is None or not self.path.is_dir():
            raise ValueError(f"pictures.labels={path}: expected a folder of labels, found none")
        self.line_width = line_width

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        return [self._label(sample) for sample in samples]

    def _label(self, sample: SourceSample) -> Label | Skip:
        image_file = (self.path / sample.file).with_suffix(".png")
        points_file = image_file.with_suffix(".json")
        size = sample.image.shape[1:]
        expected = [image_file] if self.line_width is None else [image_file, points_file]
        if not any(file.exists() for file in expected):
            names = " or ".join(file.relative_to(self.path).as_posix() for file in expected)
            return Skip(f"{sample.name} has no label: pictures.labels={self.path}: expected {names}, found none")
        keypoints = torch.zeros(0, 18, 3)
        try:
            if points_file.exists():
                found = to_tensor(read_pose(points_file, Pose).keypoints)
                keypoints = crop_points(found, sample.original, size[0])
        except ValueError as error:
            return Skip(f"{sample.name} has no label that can be read: {error}")
        if not image_file.exists():
            drawing = draw_skeletons(keypoints[None], size, size, self.line_width)[0]
            return Label((drawing * 255).round().byte(), keypoints)
        try:
            image = open_image(image_file)
        except ValueError as error:
            return Skip(f"{sample.name} has no label that can be read: {error}")
        size_read = image.height, image.width
        if size_read != sample.original:
            return Skip(f"{image_file}: expected the image's size {sample.original}, found {size_read}")
        return Label(crop_image(image, size[0]), keypoints)
