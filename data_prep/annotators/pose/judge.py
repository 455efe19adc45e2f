"""A pose annotator as a judge of generated images, as rg.evaluate asks its detectors."""

import torch
from torch import Tensor

from data_prep.annotators.pose.people import PoseAnnotator
from rg.detectors.detection import Detection
from rg.io.images import to_bytes


class AnnotatorJudge:
    """Asks a pose annotator about images in [-1, 1].

    Annotators say which keypoints they see, and not how surely: a confidence is 1 or 0, a score the share that is seen.

    Args:
        annotator: finds people; the same that made a head's labels is no independent judge of it.
    """

    def __init__(self, *, annotator: PoseAnnotator) -> None:
        self.annotator = annotator

    def detect(self, images: Tensor, people: int = 1) -> Detection:
        """The `people` people of most visible keypoints in images (B, 3, H, W) in [-1, 1], see Detection.

        A keypoint that is not seen is in the middle of those that are.
        """
        found = self.annotator.find(to_bytes(images))
        poses = torch.stack([_largest(poses.float(), people) for poses in found]).to(images.device)
        return Detection(poses[..., :2], poses[..., 2], poses[..., 2].mean(-1), poses[..., 2].any(-1))


def _largest(poses: Tensor, people: int) -> Tensor:
    """(P, 18, 3) -> (people, 18, 3), all 0 where there are fewer."""
    seen = poses[..., 2] > 0
    order = seen.sum(-1).argsort(descending=True, stable=True)[:people]
    seen, points = seen[order][..., None].float(), poses[order][..., :2]
    middle = (points.nan_to_num() * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
    chosen = torch.cat([torch.where(seen > 0, points, middle), seen], -1)
    return torch.cat([chosen, chosen.new_zeros(people - len(chosen), *chosen.shape[1:])])
