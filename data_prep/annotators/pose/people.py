"""What all who find people share: the skeleton as a label, and other sets of keypoints as OpenPose's 18."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_prep.records import Label, Skip, SourceSample
from rg.points import draw_skeletons, inside

# Of COCO's 17 keypoints, in its order; 17 is the neck, which is added to them.
FROM_COCO = (0, 17, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)

KEY = "pictures.pose"  # the setting that names an annotator where it makes labels


class PoseAnnotator:
    """Draws the skeletons of the people that a subclass finds.

    Args:
        line_width: thickness of a limb in pixels of the image.
        keep_empty: an image of nobody gets a black label with no keypoints; False skips and counts it, as training on
            poses needs.
    """

    def __init__(self, *, line_width: float = 2.0, keep_empty: bool = False) -> None:
        self.line_width, self.keep_empty = line_width, keep_empty

    def find(self, images: Tensor) -> list[Tensor]:
        """The people in images (B, 3, H, W) uint8, for each (P, 18, 3) of (x, y, visible) in its pixels."""
        raise NotImplementedError

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        found = self.find(torch.stack([sample.image for sample in samples]))
        return [self._label(sample, people) for sample, people in zip(samples, found, strict=True)]

    def _label(self, sample: SourceSample, people: Tensor) -> Label | Skip:
        size = sample.image.shape[1:]
        people = torch.cat([people[..., :2], (people[..., 2:] > 0) * inside(people[..., :2], size)[..., None]], -1)
        people = people[people[..., 2].any(-1)]
        if not len(people) and not self.keep_empty:
            return Skip(f"{sample.name} has no label: no person was found")
        drawing = draw_skeletons(people[None], size, size, self.line_width)[0]
        return Label((drawing * 255).round().byte(), people)


def find_model(key: str, folder: str, name: str, package: str) -> Path:
    """A model's file anywhere below a folder; raises FileNotFoundError, which names `key`, where there is none."""
    path = next(iter(sorted(Path(folder).rglob(name))), None)
    if path is None:
        raise FileNotFoundError(
            f"{key}.folder={folder}: expected {name} of {package}, found none: docs/data.md says how to get it"
            f"{instead_of(key)}"
        )
    return path


def instead_of(key: str) -> str:
    """What else may be done where an annotator's weights are missing, for messages."""
    if key == KEY:
        return ", or take pictures.labels=FOLDER of labels of your own, or another of pictures/pose=..."
    return ", or take other judges, as world.judges=[movenet,blazepose]"


def from_coco(keypoints: Tensor) -> Tensor:
    """COCO's 17 keypoints (P, 17, 3) as OpenPose's 18: the neck is the middle of the shoulders, seen if both are."""
    left, right = keypoints[:, 5], keypoints[:, 6]
    middle = (left[:, :2] + right[:, :2]) / 2
    neck = torch.cat([middle, torch.minimum(left[:, 2:], right[:, 2:])], -1)
    return torch.cat([keypoints, neck[:, None]], 1)[:, list(FROM_COCO)]
