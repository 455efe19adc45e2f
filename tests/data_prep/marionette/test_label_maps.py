"""Means, majorities and edges by hand on tiny arrays, and edges against a slow loop."""

import pytest
import torch

from data_prep.marionette.render import FLOOR, STEP, area_mean, edges, majority


def test_area_mean_by_hand():
    cells = torch.tensor([[[0.0, 1, 2, 3], [4, 5, 6, 7]], [[1.0, 1, 1, 1], [1, 1, 1, 5]]])
    assert area_mean(cells, 2).tolist() == [[[2.5, 4.5]], [[1, 2]]]
    assert torch.equal(area_mean(cells, 1), cells)


@pytest.mark.parametrize(
    ("block", "winner"),
    [
        ([[3, 3], [3, 7]], 3),  # three of four
        ([[1, 2], [2, 9]], 2),  # two of four
        ([[4, 1], [4, 1]], 4),  # a tie: the highest
        ([[1, 4], [4, 1]], 4),
        ([[0, 1], [2, 3]], 3),  # all differ: the highest
        ([[0, 0], [0, 0]], 0),
        ([[255, 0], [0, 255]], 255),
        ([[1, 1, 9], [2, 2, 8], [2, 1, 1]], 1),  # four of nine
    ],
)
def test_majority_by_hand(block, winner):
    cells = torch.tensor([block], dtype=torch.uint8)
    found = majority(cells, len(block))
    assert found.dtype == torch.uint8 and found.tolist() == [[[winner]]]


def test_majority_looks_at_each_pixel_alone():
    cells = torch.tensor([[[1, 1, 2, 2], [1, 0, 2, 0], [0, 0, 5, 6], [0, 3, 6, 5]]], dtype=torch.uint8)
    assert majority(cells, 2).tolist() == [[[1, 2], [0, 6]]]
    assert torch.equal(majority(cells, 1), cells)


def test_of_two_neighbours_that_differ_the_nearer_is_the_edge():
    depth = torch.full((1, 5, 5), 0.2)
    depth[:, :, 2] = 0.5  # a post before a wall
    assert edges(depth, torch.zeros_like(depth).int())[0].nonzero().tolist() == [[row, 2] for row in range(5)]
    depth[:, :, 2] = 0.1  # a slit in the wall
    assert set(map(tuple, edges(depth, torch.zeros_like(depth).int())[0].nonzero().tolist())) == {
        (row, column) for row in range(5) for column in (1, 3)
    }


def test_the_edge_of_a_large_thing_is_one_pixel_wide():
    depth, labels = torch.full((1, 7, 7), 0.2), torch.zeros(1, 7, 7, dtype=torch.int32)
    depth[:, 1:6, 1:6] = 0.4
    labels[:, 1:6, 1:6] = 3
    ring = torch.zeros(7, 7, dtype=torch.bool)
    ring[1:6, 1:6] = True
    ring[2:5, 2:5] = False
    assert torch.equal(edges(depth, labels)[0], ring)


def test_parts_at_one_depth_have_one_edge_between_them():
    depth, labels = torch.full((1, 4, 4), 0.3), torch.zeros(1, 4, 4, dtype=torch.int32)
    labels[:, :, 2:] = 1
    assert edges(depth, labels)[0].nonzero().tolist() == [[row, 1] for row in range(4)]
    labels = labels.transpose(1, 2)
    assert edges(depth, labels)[0].nonzero().tolist() == [[1, column] for column in range(4)]


def test_a_slope_is_no_edge_and_a_step_is():
    near, step = 0.5, STEP * 0.5 + FLOOR
    flat = torch.zeros(1, 1, 2, dtype=torch.int32)
    assert not edges(torch.tensor([[[near, near - 0.99 * step]]]), flat).any()
    assert edges(torch.tensor([[[near - 1.01 * step, near]]]), flat).tolist() == [[[False, True]]]


@pytest.mark.parametrize("height", [0.5, 0.9, 1.5])
def test_level_ground_has_no_edges_up_to_the_horizon(height):
    fall = (torch.arange(64).float() + 0.5) / 64 * 2 / 3  # of the rays of 64 rows below the horizon, focal length 3
    depth = (fall / height)[None, :, None].expand(1, 64, 3)
    assert not edges(depth, torch.ones(1, 64, 3, dtype=torch.int32)).any()


def test_edges_against_a_loop_over_neighbours():
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(2, 9, 8, generator=generator) ** 3
    labels = torch.randint(3, (2, 9, 8), generator=generator)
    expected = torch.zeros(2, 9, 8, dtype=torch.bool)
    for b in range(2):
        for row in range(9):
            for column in range(8):
                for down, right in ((1, 0), (0, 1)):
                    here, there = (b, row, column), (b, row + down, column + right)
                    if there[1] == 9 or there[2] == 8:
                        continue
                    gap, nearer = (depth[here] - depth[there]).abs(), max(depth[here], depth[there])
                    if labels[here] != labels[there] or gap > STEP * nearer + FLOOR:
                        expected[here if depth[here] >= depth[there] else there] = True
    assert 20 < expected.sum() < 140 and torch.equal(edges(depth, labels), expected)
