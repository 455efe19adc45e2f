"""What everyone who judges images of people answers, and how they are asked."""

from typing import NamedTuple, Protocol

from torch import Tensor


class Detection(NamedTuple):
    """What a judge found in B images, P people each, the surest first.

    points: (B, P, 18, 2), (x, y) in pixels of the images, keypoints in the order of `rg.points.KEYPOINTS`.
    confidence: (B, P, 18) in [0, 1], how sure it is of each keypoint; 0 for one that it does not see.
    score: (B, P) in [0, 1], how sure it is that there is this person.
    present: (B, P) bool, whether it takes this person to be there.
    """

    points: Tensor
    confidence: Tensor
    score: Tensor
    present: Tensor


class Detector(Protocol):
    """Finds people in images, and knows nothing of heads."""

    def detect(self, images: Tensor, people: int = 1) -> Detection:
        """The keypoints of up to `people` people in images (B, 3, H, W) in [-1, 1]."""
        ...
