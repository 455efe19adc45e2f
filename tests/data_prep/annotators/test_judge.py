import pytest
import torch

from data_prep.annotators.pose.judge import AnnotatorJudge
from data_prep.annotators.pose.people import PoseAnnotator
from rg.report import score_images


class Planted(PoseAnnotator):
    """Finds the same people in every image."""

    def __init__(self, *people: torch.Tensor) -> None:
        super().__init__()
        self.people = torch.stack(people) if people else torch.zeros(0, 18, 3)

    def find(self, images: torch.Tensor) -> list[torch.Tensor]:
        assert images.dtype == torch.uint8
        return [self.people] * len(images)


def person(seed: int, hidden: int = 0) -> torch.Tensor:
    points = torch.rand(18, 2, generator=torch.Generator().manual_seed(seed)) * 40
    seen = (torch.arange(18) >= hidden).float()[:, None]
    return torch.cat([points * seen, seen], -1)


def test_the_most_visible_people_are_answered_and_the_rest_is_nobody() -> None:
    faint, half, whole = person(0, 12), person(1, 9), person(2)
    images = torch.zeros(2, 3, 48, 48)
    found = AnnotatorJudge(annotator=Planted(faint, whole, half)).detect(images, 2)
    assert torch.equal(found.points[0, 0], whole[:, :2]) and torch.equal(found.points[0, 1, 9:], half[9:, :2])
    assert torch.equal(found.confidence[1, 1], half[:, 2]) and found.score[0].tolist() == [1, 0.5]
    # What is not seen is in the middle of what is.
    torch.testing.assert_close(found.points[1, 1, :9], half[9:, :2].mean(0).expand(9, 2))
    few = AnnotatorJudge(annotator=Planted(half)).detect(images, 3)
    assert few.present.tolist() == [[True, False, False]] * 2 and not few.score[:, 1:].any()
    nobody = AnnotatorJudge(annotator=Planted()).detect(images)
    assert not nobody.present.any() and nobody.points.shape == (2, 1, 18, 2)


def test_who_is_found_is_scored_by_what_is_seen() -> None:
    asked = torch.stack([person(2), person(3)])[None]
    judge = AnnotatorJudge(annotator=Planted(person(3), person(2, 9)))
    (scores,) = score_images(judge.detect(torch.zeros(1, 3, 48, 48), 2), asked, (0.1,))
    # One is right everywhere, of the other half is seen.
    assert scores["pck"]["target"]["0.1"] == pytest.approx(0.75) and scores["present"]
    assert scores["oks"] == pytest.approx((1 + 9 / 17) / 2)
