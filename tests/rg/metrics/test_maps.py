import math
import re

import numpy as np
import pytest
import torch

from rg.metrics.maps import FARTHEST, DepthScores, EdgeScores, align


def scores(metric, predicted, target):
    metric.update(predicted, target)
    return {name: value["mean"] for name, value in metric.compute().items()}


def depth_scores(predicted, target):
    return scores(DepthScores(), predicted, target)


def f_score(predicted, target):
    return scores(EdgeScores(), predicted, target)["f@1px"]


def random_maps(count, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, count, 6, 5, generator=generator)


def line(x, rows=slice(None), side=12):
    image = torch.zeros(1, side, side)
    image[:, rows, x] = 1
    return image


def test_a_readout_right_up_to_scale_and_shift_is_perfect():
    target = random_maps(3)[0]
    for scale, shift in ((1.0, 0.0), (0.4, 0.3), (0.01, 0.9)):
        found = depth_scores(scale * target + shift, target)
        assert found == pytest.approx({"si_log": 0, "delta1.25": 1}, abs=1e-5)


# A constant is aligned to the mean of the truth.
@pytest.mark.parametrize(("low", "high", "good"), [(0.5, 0.6, 1), (0.25, 1.0, 0), (0.4, 0.6, 1 / 2)])
def test_a_constant_and_an_inverted_readout_by_hand(low, high, good):
    target = torch.tensor([low, high]).repeat(2, 8).view(2, 4, 4)
    # The logarithm of two equally frequent values deviates by half of their difference; 0.5 is 1.25 * 0.4, and then not
    # below 1.25, while 0.6 is 1.2 * 0.5.
    expected = {"si_log": math.log(high / low) / 2, "delta1.25": good}
    for predicted in (torch.full_like(target, 0.3), 1 - target):
        assert depth_scores(predicted, target) == pytest.approx(expected)


def test_depth_scores_equal_those_of_a_loop_over_images():
    predicted, target = random_maps(20)
    predicted = predicted + target
    expected = []
    for p, t in zip(predicted.double().numpy(), target.double().numpy(), strict=True):
        p, t = p[t > FARTHEST], t[t > FARTHEST]
        (scale, shift), *_ = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), t, rcond=None)
        assert scale > 0
        ratio = np.maximum(scale * p + shift, FARTHEST) / t
        expected.append([np.log(ratio).std(), (np.maximum(ratio, 1 / ratio) < 1.25).mean()])
    found = depth_scores(predicted, target)
    assert list(found.values()) == pytest.approx(np.mean(expected, 0))
    assert 0.2 < found["delta1.25"] < 0.8


def test_what_is_read_behind_the_farthest_is_set_to_it():
    target = torch.tensor([[[0.11, 0.11, 0.6, 0.6, 1.0]]])
    predicted = torch.tensor([[[-1.0, 0.0, 0.6, 0.6, 1.0]]])
    aligned = align(predicted.flatten(1), target.flatten(1), torch.ones(1, 5, dtype=torch.bool))
    assert aligned[0, 0] < FARTHEST
    ratio = aligned.clamp_min(FARTHEST) / target.flatten(1)
    assert depth_scores(predicted, target)["si_log"] == pytest.approx(float(ratio.log().std(correction=0)))


def test_far_pixels_do_not_count():
    predicted, target = random_maps(4)
    before = depth_scores(predicted, target)
    sky = torch.rand(4, 3, 5)
    far = depth_scores(torch.cat([predicted, sky], 1), torch.cat([target, sky * FARTHEST], 1))
    assert far == pytest.approx(before)


def test_images_without_depth_are_left_out():
    predicted, target = random_maps(3)
    before = depth_scores(predicted[:2], target[:2])
    target[2] = 0
    assert depth_scores(predicted, target) == pytest.approx(before)
    with pytest.raises(ValueError, match="DepthScores of no images.*at least one"):
        depth_scores(predicted[2:], target[2:])


# The precision of a white image is the share of the three columns around a line.
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (line(5), 1),
        (line(6), 1),
        (line(4), 1),
        (line(7), 0),
        (torch.ones(1, 12, 12), 2 * 0.25 / 1.25),
        (line(5, slice(0, 6)), 2 * (7 / 12) / (1 + 7 / 12)),  # the row below the last counts as near
        (line(6) + line(8), 2 * 0.5 / 1.5),
        (torch.zeros(1, 12, 12), 0),
    ],
)
def test_f_score_by_hand(found, expected):
    assert f_score(found, line(5)) == pytest.approx(expected)
    assert f_score(line(5), found) == pytest.approx(expected), "precision and recall change places"


def test_corners_are_near_and_two_pixels_are_not():
    point = torch.zeros(1, 5, 5)
    point[0, 2, 2] = 1
    for y in range(5):
        for x in range(5):
            other = torch.zeros(1, 5, 5)
            other[0, y, x] = 1
            assert f_score(other, point) == float(max(abs(y - 2), abs(x - 2)) <= 1)


def test_only_what_is_brighter_than_the_middle_is_an_edge():
    assert f_score(line(5) * 0.51, line(5)) == 1
    assert f_score(line(5) * 0.5, line(5)) == 0


def test_images_without_edges():
    nothing = torch.zeros(1, 12, 12)
    assert f_score(nothing, nothing) == 1
    assert f_score(line(5), nothing) == 0


@pytest.mark.parametrize("make", [DepthScores, EdgeScores])
def test_scores_are_means_over_images_in_any_batch(make):
    predicted, target = random_maps(5)
    whole, parts = make(), make()
    whole.update(predicted, target)
    for rows in (slice(0, 1), slice(1, 5)):
        parts.update(predicted[rows], target[rows])
    each = [scores(make(), predicted[i : i + 1], target[i : i + 1]) for i in range(5)]
    for name, value in whole.compute().items():
        values = torch.tensor([one[name] for one in each])
        expected = {"mean": float(values.mean()), "sem": float(values.std() / math.sqrt(5))}
        assert value == pytest.approx(expected, abs=1e-6) and parts.compute()[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [DepthScores, EdgeScores])
def test_maps_that_do_not_fit_are_refused(make):
    for predicted, target in ((torch.ones(2, 3, 3), torch.ones(2, 3, 4)), (torch.ones(3, 3), torch.ones(3, 3))):
        with pytest.raises(ValueError, match=rf"\(B, H, W\).*{re.escape(str(tuple(target.shape)))}"):
            make().update(predicted, target)
