"""Where the people of a picture are: a network that gives boxes, and the square crops that a pose is read from.

A box is (x, y, width, height): its centre in pixels of the picture it is named with, and its sides.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.networks import Hourglass
from rg.points import Size, rescale

PATCH = 4  # pixels per cell of the finder's maps
MARGIN = 1.25  # side of a crop over the larger side of its box: room for the skull, the feet, and an error of the box
OVERLAP = 0.5  # intersection over union from which on two boxes are of one person


class PersonFinder(Hourglass):
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
        # A box is at home at half the picture's height.
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
        found, scores = [], []
        for _ in range(people):
            score, best = left.max(1, keepdim=True)
            box = boxes.gather(1, best[..., None].expand(-1, -1, 4))
            found.append(box)
            scores.append(score)
            left = left * (overlap(boxes, box) < OVERLAP)
        return torch.cat(found, 1), torch.cat(scores, 1)


def overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) and others (..., 4): (...) in [0, 1]."""
    low = torch.maximum(boxes[..., :2] - boxes[..., 2:] / 2, others[..., :2] - others[..., 2:] / 2)
    high = torch.minimum(boxes[..., :2] + boxes[..., 2:] / 2, others[..., :2] + others[..., 2:] / 2)
    both = (high - low).clamp_min(0).prod(-1)
    return both / (boxes[..., 2:].prod(-1) + others[..., 2:].prod(-1) - both).clamp_min(1e-9)


def boxes_around(keypoints: Tensor, size: Size) -> Tensor:
    """The boxes of people (..., 18, 3) in a picture of `size`: around all keypoints, those outside moved to its border.

    Hidden keypoints count too: a box does not shrink when something stands in front of the person. (..., 4)
    """
    border = keypoints.new_tensor([size[1], size[0]]) - 0.5
    points = keypoints[..., :2].clamp_min(-0.5).minimum(border)
    low, high = points.amin(-2), points.amax(-2)
    return torch.cat([(low + high) / 2, high - low], -1)


def crop_matrices(boxes: Tensor, size: Size) -> Tensor:
    """Maps from a crop to its picture, as affine_grid takes them, for boxes (N, 4) in a picture of `size`: (N, 2, 3).

    A crop is the square around the box's centre, MARGIN times as large as the box's larger side. Coordinates run from
    -1 to 1 over the borders of crop and picture.
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
    """Moves points (N, K, 2) of pictures of `size` into their crops of `side` pixels."""
    unit = 2 * rescale(points, size, (1, 1))
    inner = torch.linalg.solve(matrices[:, None, :, :2], (unit - matrices[:, None, :, 2])[..., None])[..., 0]
    return rescale(inner / 2, (1, 1), (side, side))


def from_crops(points: Tensor, matrices: Tensor, size: Size, side: int) -> Tensor:
    """Moves points (N, K, 2) of crops of `side` pixels into their pictures of `size`: the inverse of to_crops."""
    unit = 2 * rescale(points, (side, side), (1, 1))
    outer = (matrices[:, None, :, :2] @ unit[..., None])[..., 0] + matrices[:, None, :, 2]
    return rescale(outer / 2, (1, 1), size)
