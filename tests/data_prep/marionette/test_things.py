"""The things that lie around: each on the ground, in its place and of its size."""

import pytest
import torch

from data_prep.marionette.scene import MAX_THINGS, THINGS, Thing
from data_prep.marionette.stage import THING_PARTS, thing_capsules


def extent(scene, *things):
    """Lowest and highest (x, y, z) of the things in a scene."""
    capsules = thing_capsules([scene(things=things)])
    there = capsules.radius[0] > 0
    ends = torch.stack([capsules.start[:, 0, there], capsules.end[:, 0, there]])
    return (ends - capsules.radius[0, there]).amin((0, 2)).tolist(), (ends + capsules.radius[0, there]).amax(
        (0, 2)
    ).tolist()


def test_a_ball_touches_the_ground(scene):
    low, high = extent(scene, Thing("ball", 0.2, (1.0, -2.0)))
    assert low == pytest.approx([0.8, 0, -2.2]) and high == pytest.approx([1.2, 0.4, -1.8])


@pytest.mark.parametrize("kind", THINGS)
def test_things_rest_on_the_ground_and_are_as_large_as_their_size(scene, kind):
    low, high = extent(scene, Thing(kind, 0.5, (0.0, 0.0)))
    assert low[1] <= 1e-9 < high[1]
    assert 0.5 < max(b - a for a, b in zip([low[0], 0.0], high[:2], strict=True)) < 1.4


@pytest.mark.parametrize("kind", THINGS)
def test_things_are_where_their_place_says(scene, kind):
    capsules = thing_capsules([scene(things=(Thing(kind, 0.5, place),)) for place in ((0.0, 0.0), (3.0, -4.0))])
    moved = torch.tensor([3.0, 0.0, -4.0], dtype=torch.float64)
    for ends in (capsules.start, capsules.end):
        assert ends[[0, 2], 0, 0].tolist() == [0, 0]
        there = capsules.radius[0] > 0
        torch.testing.assert_close(ends[:, 1, there], ends[:, 0, there] + moved[:, None])


def test_each_scene_has_its_own_things_and_absent_ones_are_no_capsules(scene):
    ball, tree = Thing("ball", 0.1, (0.5, 0.5)), Thing("tree", 2.0, (-1.0, -1.0))
    capsules = thing_capsules([scene(things=(ball, tree)), scene(), scene(things=(tree,) * MAX_THINGS)])
    assert capsules.radius.shape == (3, MAX_THINGS * THING_PARTS)
    assert (capsules.radius > 0).sum(1).tolist() == [3, 0, 2 * MAX_THINGS]
    alone = thing_capsules([scene(things=(ball, tree))])
    for name in ("start", "end"):
        assert torch.equal(getattr(capsules, name)[:, :1], getattr(alone, name))
