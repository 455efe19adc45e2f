from pathlib import Path

import pytest
import torch

from data_prep.annotators.edges import Canny
from data_prep.annotators.rendered import ExactEdges
from data_prep.records import Skip, SourceSample
from data_prep.sources.marionette import MarionetteSource
from rg.metrics.maps import EdgeScores


def square(level, side=24):
    """A grey square from 8 to 15 on black."""
    image = torch.zeros(3, side, side, dtype=torch.uint8)
    image[:, 8:16, 8:16] = level
    return SourceSample(image, "", "picture", file=Path("a/b.png"), original=(side, side))


def test_the_outline_of_a_square_is_found():
    (label,) = Canny(line_width=1).annotate([square(255)])
    assert label.image.shape == (3, 24, 24) and set(label.image.unique().tolist()) == {0, 255}
    assert (label.image == label.image[0]).all() and label.keypoints.shape == (0, 18, 3)
    outline = torch.zeros(24, 24)
    outline[8:16, 8:16] = 1
    outline[9:15, 9:15] = 0
    score = EdgeScores()
    score.update(label.image[:1] / 255, outline[None])
    assert score.compute()["f@1px"]["mean"] > 0.95


def test_lines_get_their_width():
    thin, thick = (Canny(line_width=width).annotate([square(255)])[0].image[0] for width in (1, 2))
    grown = [thin.roll((dy, dx), (0, 1)) for dy in (0, 1) for dx in (0, 1)]
    assert torch.equal(thick, torch.stack(grown).amax(0))


def test_an_image_without_edges_is_named():
    faint, bright = Canny().annotate([square(20), square(255)])
    assert faint == Skip("a/b.png has no label: no edge was found") and not isinstance(bright, Skip)
    assert not isinstance(Canny(low=20, high=40).annotate([square(20)])[0], Skip), "the thresholds decide"


def test_outlines_of_people_are_among_the_edges():
    samples = MarionetteSource().read("val", range(16))
    found, exact = Canny(low=50, high=100).annotate(samples), ExactEdges().annotate(samples)
    score = EdgeScores()
    score.update(*(torch.stack([label.image[0] for label in labels]) / 255 for labels in (found, exact)))
    assert score.compute()["f@1px"]["mean"] > 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"low": 0, "high": 10}, "0 < low <= high.*low=0, high=10"),
        ({"low": 20, "high": 10}, "0 < low <= high.*low=20, high=10"),
        ({"line_width": 0}, "line_width.* 1.* 0"),
        ({"line_width": 1.5}, r"line_width.* 1.* 1\.5"),
    ],
)
def test_bad_settings(arguments, words):
    with pytest.raises(ValueError, match=words):
        Canny(**arguments)
