"""Networks that judge pictures of people, 18 keypoints each and their confidence, and know nothing of heads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.finder import PersonFinder, crop, crop_matrices, from_crops
from rg.networks import Hourglass
from rg.points import KEYPOINTS, peaks

CROP = 64  # side in pixels of the crops that poses are read from
LEAST_KEYPOINTS = 6  # of a person who counts in full: a portrait shows eight

# The keypoint that each one becomes when a picture is mirrored: left and right change places.
_SIDES = {"left": "right", "right": "left"}
MIRROR = tuple(KEYPOINTS.index("_".join(_SIDES.get(word, word) for word in name.split("_"))) for name in KEYPOINTS)


class Detection(NamedTuple):
    """What the detector found in B pictures, P people each, the surest first.

    points: (B, P, 18, 2), (x, y) in pixels of the pictures, keypoints in the order of `rg.points.KEYPOINTS`.
    confidence: (B, P, 18) in [0, 1], the largest probability mass of any window of 5x5 cells: low when a keypoint lies
        outside the picture and when it could be in several places.
    score: (B, P) in [0, 1], how sure it is that there is this person: that of the box times how concentrated the
        keypoints are that its crop seems to hold.
    present: (B, P) bool, whether the score reaches the detector's threshold.
    """

    points: Tensor
    confidence: Tensor
    score: Tensor
    present: Tensor


class KeypointDetector(Hourglass):
    """Finds people, then for each keypoint of each a distribution over the cells of a crop around the person.

    Crops enter as 4x4 patches and the maps leave as 2x2 patches, so that nearly all arithmetic runs at a quarter of
    the resolution: `detect` takes about 6 ms of one core for a 64 px picture of one person.

    Args:
        widths: channels at 1/4, 1/8 and 1/16 of a crop's resolution, multiples of 8.
        finder_widths: the same for the network that finds people.
        threshold: score from which on a person counts as present, in [0, 1].
    """

    def __init__(self, *, widths: Sequence[int], finder_widths: Sequence[int], threshold: float) -> None:
        super().__init__(widths, 4)
        if not 0 <= threshold <= 1:
            raise ValueError(f"expected a threshold in [0, 1], got {threshold}: change `threshold`")
        self.threshold = threshold
        self.maps = nn.Conv2d(widths[0], 4 * len(KEYPOINTS), 1)
        self.absent = nn.Linear(widths[2], len(KEYPOINTS))
        self.finder = PersonFinder(widths=finder_widths)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        widths = {"widths": list(self.widths), "finder_widths": list(self.finder.widths)}
        return {**widths, "threshold": self.threshold}

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Scores every cell, and absence, for every keypoint; one softmax over a keypoint's scores is its distribution.

        Args:
            crops: (B, 3, H, W) in [-1, 1], H and W multiples of 16, one person in the middle of each.

        Returns:
            Scores of the cells (B, 18, H / 2, W / 2) and of absence (B, 18), any range.

        Raises:
            ValueError: crops of another shape.
        """
        fine, coarse = self.features(crops)
        return F.pixel_shuffle(self.maps(fine), 2), self.absent(coarse.mean((2, 3)))

    def probabilities(self, crops: Tensor) -> Tensor:
        """Where each keypoint is, averaged over the crops and their mirror images: (B, 18, H / 2, W / 2).

        A map sums to 1 less the probability that its keypoint is not in the crop.
        """
        straight, mirrored = (_softmax(*self(x)) for x in (crops, crops.flip(-1)))
        return (straight + mirrored[:, list(MIRROR)].flip(-1)) / 2

    @torch.no_grad()
    def detect(self, images: Tensor, people: int = 1) -> Detection:
        """Finds the keypoints of up to `people` people in images (B, 3, H, W) in [-1, 1], sides multiples of 16."""
        size = (images.shape[-2], images.shape[-1])
        boxes, scores = self.finder.find(images, people)
        matrices = crop_matrices(boxes.flatten(0, 1), size)
        cells = self.probabilities(crop(images.repeat_interleave(people, 0), matrices, CROP))
        points = from_crops(peaks(cells, (CROP, CROP))[0], matrices, size, CROP).unflatten(0, (-1, people))
        confidence = (F.avg_pool2d(cells, 5, stride=1, padding=2) * 25).flatten(2).amax(-1).clamp(0, 1)
        confidence = confidence.unflatten(0, (-1, people))
        held = cells.sum((1, 2, 3)).unflatten(0, (-1, people))  # how many keypoints the crop seems to hold
        clear = confidence.sum(-1) / held.clamp_min(LEAST_KEYPOINTS)
        score, order = (scores * clear.clamp_max(1)).sort(dim=1, descending=True, stable=True)
        rows = torch.arange(len(images), device=images.device)[:, None]
        return Detection(points[rows, order], confidence[rows, order], score, score >= self.threshold)


def _softmax(cells: Tensor, absent: Tensor) -> Tensor:
    scores = torch.cat([cells.flatten(2), absent[..., None]], -1).float()
    return scores.softmax(-1)[..., :-1].view_as(cells)
