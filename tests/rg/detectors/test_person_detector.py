import pytest
import torch

from rg.detectors.keypoints import (
    MARGIN,
    PersonDetector,
    boxes_around,
    crop,
    crop_matrices,
    from_crops,
    overlap,
    to_crops,
)


class Planted(PersonDetector):
    """Gives scores to a few cells of a 32x32 image, all boxes 8x16 around their cells."""

    def __init__(self, cells: dict[tuple[int, int], float]) -> None:
        super().__init__(widths=(8, 8, 8))
        self.cells = cells

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        scores = torch.full((len(images), 8, 8), -20.0)
        for (row, column), score in self.cells.items():
            scores[:, row, column] = score
        return scores, torch.stack([4 * columns, 4 * rows, torch.full((8, 8), 8.0), torch.full((8, 8), 16.0)], -1)[
            None
        ].expand(len(images), -1, -1, -1)


def test_neighbours_are_one_person_and_the_best_comes_first() -> None:
    finder = Planted({(2, 2): 1.0, (3, 2): 3.0, (3, 5): 2.0})
    boxes, scores = finder.find(torch.zeros(2, 3, 32, 32), 3)
    assert boxes.shape == (2, 3, 4) and scores.shape == (2, 3)
    # The cell above the best one overlaps it by 3/5; the one three cells beside it does not overlap.
    assert boxes[0, :2].tolist() == [[8, 12, 8, 16], [20, 12, 8, 16]]
    torch.testing.assert_close(scores[0], torch.tensor([3.0, 2.0, -20.0]).sigmoid())


def test_a_cell_gives_its_own_place_and_half_the_height() -> None:
    finder = PersonDetector(widths=(8, 8, 8)).eval()
    with torch.no_grad():
        for parameter in finder.maps.parameters():
            parameter.zero_()
        scores, boxes = finder(torch.zeros(1, 3, 32, 48))
    assert scores.shape == (1, 8, 12) and boxes.shape == (1, 8, 12, 4)
    assert boxes[0, 0, 0].tolist() == [1.5, 1.5, 16, 16] and boxes[0, 2, 5].tolist() == [21.5, 9.5, 16, 16]


def test_overlap_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 0, 2, 2], [5, 5, 2, 2]])
    torch.testing.assert_close(overlap(boxes, boxes[:1]), torch.tensor([1, 1 / 3, 0]))


def test_box_holds_hidden_keypoints_and_ends_at_the_border() -> None:
    keypoints = torch.tensor([[10.0, 20, 1], [30, 40, 0], [20, 100, 0]])
    assert boxes_around(keypoints, (64, 64)).tolist() == [20, 41.75, 20, 43.5]


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_points_go_into_crops_and_back(size: tuple[int, int]) -> None:
    boxes = torch.tensor([[20.0, 30, 16, 8], [31.5, 31.5, 4, 12]])
    matrices = crop_matrices(boxes, size)
    points = torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(0)) * 60
    inner = to_crops(points, matrices, size, 64)
    torch.testing.assert_close(from_crops(inner, matrices, size, 64), points, atol=1e-4, rtol=0)
    # The box's centre is the crop's; its larger side takes up 1 / MARGIN of it.
    corners = torch.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:].amax(1, keepdim=True) / 2], 1)
    expected = torch.tensor([[31.5, 31.5], [31.5 + 32 / MARGIN, 31.5 + 32 / MARGIN]]).expand(2, 2, 2)
    torch.testing.assert_close(to_crops(corners, matrices, size, 64), expected, atol=1e-4, rtol=0)


def test_a_crop_shows_what_its_points_say() -> None:
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(80.0), indexing="ij")
    images = torch.stack([columns, rows])[None]  # each pixel holds its own place
    matrices = crop_matrices(torch.tensor([[40.0, 20.0, 16.0, 10.0]]), (48, 80))
    cut = crop(images, matrices, 32)
    inner = torch.tensor([[[3.0, 5.0], [20.0, 30.0]]])
    seen = torch.stack([cut[0, :, int(y), int(x)] for x, y in inner[0].tolist()])
    torch.testing.assert_close(seen, from_crops(inner, matrices, (48, 80), 32)[0], atol=1e-3, rtol=0)
