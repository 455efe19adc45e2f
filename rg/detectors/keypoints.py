"""Networks that judge images of people, 18 keypoints each and their confidence, and know nothing of heads."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.detectors.detection import Detection
from rg.detectors.hourglass import Hourglass
from rg.points import KEYPOINTS, MIRROR, Size, peaks, rescale

CROP = 64  # side in pixels of the crops that poses are read from
LEAST_KEYPOINTS = 6  # of a person who counts in full: a portrait shows eight


class KeypointDetector(Hourglass):
    """Finds people, then for each keypoint of each a distribution over the cells of a crop around the person.

    Crops enter as 4x4 patches and the maps leave as 2x2 patches, so that nearly all arithmetic runs at a quarter of
    the resolution: `detect` takes about 6 ms of one core for a 64 px image of one person.

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
        self.finder = PersonDetector(widths=finder_widths)

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
        """Finds the keypoints of up to `people` people in images (B, 3, H, W) in [-1, 1], sides multiples of 16.

        A keypoint's confidence is the largest probability mass of any window of 5x5 cells: low when it lies outside the
        image and when it could be in several places. A person's score is that of the box times how concentrated the
        keypoints are that its crop seems to hold.
        """
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


PATCH = 4  # pixels per cell of the finder's maps
MARGIN = 1.25  # side of a crop over the larger side of its box: room for the skull, the feet, and an error of the box
OVERLAP = 0.5  # intersection over union from which on two boxes are of one person


class PersonDetector(Hourglass):
    """For every cell of 4x4 pixels whether a person's box is centred there, and that box (Zhou et al., 2019).

    Args:
        widths: channels at 1/4, 1/8 and 1/16 of the resolution, multiples of 8.
    """

    def __init__(self, *, widths: Sequence[int]) -> None:
        super().__init__(widths, PATCH)
        self.maps = nn.Conv2d(widths[0], 5, 1)
        with torch.no_grad():
            self.maps.bias.copy_(torch.tensor([-3.0, 0, 0, 0, 0]))  # few cells are centres

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and boxes of all cells of images (B, 3, H, W) in [-1, 1], H and W multiples of 16.

        Returns:
            Scores (B, H / 4, W / 4), logits, and boxes (B, H / 4, W / 4, 4) in pixels of the images.
        """
        h, w = images.shape[-2:]
        score, *place = self.maps(self.features(images)[0]).float().unbind(1)
        rows, columns = (torch.arange(side // PATCH, device=images.device) for side in (h, w))
        cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        centre = rescale(cells + torch.stack(place[:2], -1), (h // PATCH, w // PATCH), (h, w))
        # Logits of 0 give a box as wide and as high as half the image is high.
        sides = torch.stack(place[2:], -1).clamp(-3, 3).exp() * h / 2
        return score, torch.cat([centre, sides], -1)

    @torch.no_grad()
    def find(self, images: Tensor, people: int) -> tuple[Tensor, Tensor]:
        """The `people` most likely boxes, best first, no two of one person (non-maximum suppression).

        Returns:
            Boxes (B, people, 4) in pixels, and their scores (B, people) in [0, 1], 0 where there is no other box.
        """
        logits, boxes = self(images)
        left, boxes = logits.sigmoid().flatten(1), boxes.flatten(1, 2)
        chosen, scores = [], []
        for _ in range(people):
            score, best = left.max(1, keepdim=True)
            box = boxes.gather(1, best[..., None].expand(-1, -1, 4))
            chosen.append(box)
            scores.append(score)
            left = left * (overlap(boxes, box) < OVERLAP)
        return torch.cat(chosen, 1), torch.cat(scores, 1)


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) and others (..., 4): (...) in [0, 1]."""
    low = torch.maximum(boxes[..., :2] - boxes[..., 2:] / 2, others[..., :2] - others[..., 2:] / 2)
    high = torch.minimum(boxes[..., :2] + boxes[..., 2:] / 2, others[..., :2] + others[..., 2:] / 2)
    both = (high - low).clamp_min(0).prod(-1)
    return both / (boxes[..., 2:].prod(-1) + others[..., 2:].prod(-1) - both).clamp_min(1e-9)


def boxes_around(keypoints: Tensor, size: Size) -> Tensor:
    """The boxes of people (..., 18, 3) in an image of `size`: around all keypoints, those outside moved to its border.

    Hidden keypoints count too: a box does not shrink when something stands in front of the person. (..., 4)
    """
    border = keypoints.new_tensor([size[1], size[0]]) - 0.5
    points = keypoints[..., :2].clamp_min(-0.5).minimum(border)
    low, high = points.amin(-2), points.amax(-2)
    return torch.cat([(low + high) / 2, high - low], -1)


def crop_matrices(boxes: Tensor, size: Size) -> Tensor:
    """Maps from a crop to its image, as affine_grid takes them, for boxes (N, 4) in an image of `size`: (N, 2, 3).

    A crop is the square around the box's centre, MARGIN times as large as the box's larger side. Coordinates run from
    -1 to 1 over the borders of crop and image.
    """
    side = MARGIN * boxes[:, 2:].amax(-1).clamp_min(1)
    height, width = size
    centre = 2 * rescale(boxes[:, :2], size, (1, 1))
    zero = torch.zeros_like(side)
    rows = (torch.stack([side / width, zero, centre[:, 0]], -1), torch.stack([zero, side / height, centre[:, 1]], -1))
    return torch.stack(rows, 1)


def crop(images: Tensor, matrices: Tensor, side: int) -> Tensor:
    """Cuts (N, C, side, side) out of images (N, C, H, W), what lies outside repeating the border; see crop_matrices."""
    grid = F.affine_grid(matrices, [len(images), images.shape[1], side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def to_crops(points: Tensor, matrices: Tensor, size: Size, side: int) -> Tensor:
    """Moves points (N, K, 2) of images of `size` into their crops of `side` pixels."""
    unit = 2 * rescale(points, size, (1, 1))
    inner = torch.linalg.solve(matrices[:, None, :, :2], (unit - matrices[:, None, :, 2])[..., None])[..., 0]
    return rescale(inner / 2, (1, 1), (side, side))


def from_crops(points: Tensor, matrices: Tensor, size: Size, side: int) -> Tensor:
    """Moves points (N, K, 2) of crops of `side` pixels into their images of `size`: the inverse of to_crops."""
    unit = 2 * rescale(points, (side, side), (1, 1))
    outer = (matrices[:, None, :, :2] @ unit[..., None])[..., 0] + matrices[:, None, :, 2]
    return rescale(outer / 2, (1, 1), size)
