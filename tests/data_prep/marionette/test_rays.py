"""The ray-caster against closed forms and sampled spheres."""

import pytest
import torch

from data_prep.marionette.rays import Capsules, cast, surface


def grid(side):
    centers = (torch.arange(side).double() + 0.5) / side * 2 - 1
    return centers.repeat(side), -centers.repeat_interleave(side)


def cast_one(start, end, radius, side=48):
    ends = torch.tensor([start, end]).double()[..., None, None]
    hits = cast(Capsules(ends[0], ends[1], torch.tensor([[radius]]).double()), side)
    z = torch.full((side * side,), -torch.inf)
    z[hits.ray] = hits.z
    return z.double(), hits


def test_sphere_in_closed_form():
    z, hits = cast_one((0.1, -0.2, 0.3), (0.1, -0.2, 0.3), 0.25)
    x, y = grid(48)
    square = 0.25**2 - (x - 0.1) ** 2 - (y + 0.2) ** 2
    assert torch.equal(z > -torch.inf, square > 0)
    torch.testing.assert_close(z[square > 0], 0.3 + square[square > 0].sqrt(), atol=1e-5, rtol=0)
    order = hits.ray.argsort()
    normal = torch.stack([x - 0.1, y + 0.2, square.clamp_min(0).sqrt()])[:, square > 0] / 0.25
    torch.testing.assert_close(hits.normal[:, order].double(), normal, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ((-0.5, 0.1, 0.0), (0.4, 0.3, 0.0)),  # in the picture plane
        ((-0.3, -0.2, -0.6), (0.1, 0.3, 0.5)),  # slanted towards the camera
        ((0.2, 0.1, 0.5), (0.25, 0.1, -0.9)),  # nearly along a ray
        ((0.2, 0.1, -0.5), (0.2, 0.1, 0.4)),  # along a ray
        ((0.8, 0.9, 0.0), (1.7, 1.2, 0.3)),  # half outside of the picture
    ],
)
def test_capsule_is_the_union_of_its_spheres(start, end):
    radius = 0.15
    z, _ = cast_one(start, end, radius, side=32)
    x, y = grid(32)
    share = torch.linspace(0, 1, 2001).double()[:, None]
    a, b = torch.tensor([start, end]).double()
    centers = a + share * (b - a)
    square = radius**2 - (x - centers[:, 0:1]) ** 2 - (y - centers[:, 1:2]) ** 2
    fronts = torch.where(square > 0, centers[:, 2:] + square.clamp_min(0).sqrt(), -torch.inf).amax(0)
    safe = square.amax(0).abs() > 1e-4  # sampled spheres leave a ragged outline
    assert safe.sum() > 32 * 32 - 4 and (fronts > -torch.inf).sum() > 8
    assert torch.equal((z > -torch.inf)[safe], (fronts > -torch.inf)[safe])
    hit = safe & (fronts > -torch.inf)
    torch.testing.assert_close(z[hit], fronts[hit], atol=1e-3, rtol=0)


def test_the_nearest_capsule_wins_whatever_the_order():
    near, far = (0.0, 0.0, 0.4), (0.05, 0.0, -0.4)
    for ends, winner in (((near, far), 0), ((far, near), 1)):
        points = torch.tensor(ends).double().T[:, None]
        hits = cast(Capsules(points, points, torch.full((1, 2), 0.3).double()), 32)
        ray = (hits.ray == 16 * 32 + 16).nonzero().item()
        assert hits.capsule[ray] == winner


def test_a_capsule_of_radius_zero_meets_no_ray():
    point = torch.zeros(3, 1, 1).double()
    assert len(cast(Capsules(point, point, torch.zeros(1, 1).double()), 33).ray) == 0
    assert surface(point[:, 0, 0], point[:, 0, 0], torch.zeros(()).double(), *point[:2, 0, 0])[0] == -torch.inf
