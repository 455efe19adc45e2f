import pytest
import torch

from experiments.marionette.judges.measure import accuracy, agreement, choose_threshold
from rg.detectors.detection import Detection


def detection(points: torch.Tensor) -> Detection:
    images, people = points.shape[:2]
    return Detection(
        points, torch.ones(images, people, 18), torch.zeros(images, people), torch.zeros(images, people).bool()
    )


def test_threshold_lies_between_people_and_nobody() -> None:
    assert choose_threshold(torch.linspace(0.7, 0.9, 101), torch.linspace(0, 0.1, 101)) == pytest.approx(0.4, abs=0.01)
    # Where they overlap, people go first.
    assert choose_threshold(torch.full((9,), 0.3), torch.full((9,), 0.5)) == pytest.approx(0.3)


def test_accuracy_matches_people_whatever_their_score() -> None:
    keypoints = torch.rand(1, 2, 18, 3) * 20 + torch.tensor([0.0, 40.0])[:, None, None]
    points = keypoints[:, [1, 0], :, :2].clone()
    points[:, 0, :9] += 1000
    assert accuracy(detection(points), keypoints, True) == [0.75] * 3


def test_agreement_counts_visible_keypoints_of_matched_people() -> None:
    keypoints = torch.rand(1, 2, 18, 3) * 20 + torch.tensor([0.0, 100.0])[:, None, None]
    keypoints[..., 2] = 1
    keypoints[:, :, 12:, 2] = 0
    one, other = (keypoints[..., :2].clone() for _ in range(2))
    one[:, :, :6, 0] += 30  # wrong by the first
    other[:, :, 3:9, 0] += 30  # wrong by the second
    other[:, :, 12:] += 50  # hidden, does not count
    found = agreement(detection(one), detection(other[:, [1, 0]]), keypoints, 0.1)
    # Of twelve: 9..11 right by both, 3..5 wrong by both and in one place, six right by one alone and 30 pixels apart.
    assert found == pytest.approx((0.25, 0.25, 0.5, 15.0))
