"""The ray-caster against closed forms, sampled spheres, a numeric solver, and every ray cast at every capsule."""

import math

import pytest
import torch

from data_prep.marionette.raycast import NEAR, Capsules, box, cast, directions, fragments, intersect, nearest, normals
from data_prep.marionette.scene import FOCAL
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.stage import set_stage


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def cast_one(start, end, radius, side=48):
    """Depths (side*side,), inf for a miss, and hits of an image of one capsule."""
    ends = vector(start, end)[..., None, None]
    hits = cast(Capsules(ends[0], ends[1], vector([radius])), side, FOCAL)
    depth = torch.full((side * side,), torch.inf)
    depth[hits.ray] = hits.depth
    return depth.double(), hits


def rays(side):
    """The rays of an image in float64, (3, side*side)."""
    x, y = torch.meshgrid(*[((torch.arange(side).double() + 0.5) / side * 2 - 1) / FOCAL] * 2, indexing="xy")
    return torch.stack([x, -y, -torch.ones_like(x)]).flatten(1)


def union_of_spheres(direction, start, end, radius, count=2001):
    """Where rays (3,R) from the origin first meet one of `count` spheres along a capsule, and how deep they graze."""
    share = torch.linspace(0, 1, count).double()[:, None]
    centers = start + share * (end - start)
    square, across = (direction**2).sum(0), centers @ direction
    root = across**2 - square * ((centers**2).sum(1, keepdim=True) - radius**2)
    first = torch.where(root > 0, (across - root.clamp_min(0).sqrt()) / square, torch.inf).amin(0)
    return first, root.amax(0)


def test_directions_go_through_the_centres_of_cells():
    found = directions(torch.arange(2 * 9), 3, 2.0)
    assert found.shape == (3, 18)
    assert found[:, 0].tolist() == pytest.approx([-1 / 3, 1 / 3, -1]) and found[:, 4].tolist() == [0, 0, -1]
    assert found[:, 5].tolist() == pytest.approx([1 / 3, 0, -1]) and torch.equal(found[:, :9], found[:, 9:])
    torch.testing.assert_close(directions(torch.arange(40 * 40), 40, FOCAL).double(), rays(40), atol=1e-7, rtol=0)


def test_sphere_in_closed_form():
    center, radius = vector(0.1, -0.2, -3.0), 0.25
    depth, hits = cast_one(center.tolist(), center.tolist(), radius)
    ray = rays(48)
    square, across = (ray**2).sum(0), center @ ray
    root = across**2 - square * (center @ center - radius**2)
    assert torch.equal(depth < torch.inf, root > 0) and (root > 0).sum() > 100
    expected = ((across - root.clamp_min(0).sqrt()) / square)[root > 0]
    torch.testing.assert_close(depth[root > 0], expected, atol=1e-5, rtol=0)
    order = hits.ray.argsort()
    point = ray[:, root > 0] * expected
    torch.testing.assert_close(hits.point[:, order].double(), point, atol=1e-5, rtol=0)
    torch.testing.assert_close(hits.normal[:, order].double(), (point - center[:, None]) / radius, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ((-0.5, 0.1, -3.0), (0.4, 0.3, -3.0)),  # across the image
        ((-0.3, -0.2, -3.6), (0.1, 0.3, -2.5)),  # slanted towards the camera
        ((0.2, 0.1, -2.4), (0.25, 0.1, -3.9)),  # nearly along a ray
        ((0.0, 0.0, -3.5), (0.0, 0.0, -2.4)),  # straight at the camera
        ((0.0, 0.0, -2.4), (0.0, 0.0, -3.5)),  # straight away from it
        ((0.8, 0.9, -3.0), (1.7, 1.2, -2.7)),  # half outside of the image
        ((0.1, -0.3, -0.5), (0.4, 0.9, -9.0)),  # from near to far
    ],
)
def test_capsule_is_the_union_of_its_spheres(start, end):
    radius = 0.15
    depth, hits = cast_one(start, end, radius, side=32)
    expected, root = union_of_spheres(rays(32), vector(*start), vector(*end), radius)
    safe = root.abs() > 1e-3  # sampled spheres leave a ragged outline
    assert safe.sum() > 32 * 32 - 24 and (expected < torch.inf).sum() > 8
    assert torch.equal((depth < torch.inf)[safe], (expected < torch.inf)[safe])
    hit = safe & (expected < torch.inf)
    torch.testing.assert_close(depth[hit], expected[hit], atol=1e-3, rtol=0)
    assert (hits.normal.norm(dim=0) - 1).abs().max() < 1e-3
    assert ((hits.normal * hits.point).sum(0) < 1e-3).all()  # what is seen faces the camera


def test_intersections_against_a_march_along_the_ray(distance, uniform):
    """Random rays in float64: the first place where the distance from the capsule falls to nothing."""
    count = 400
    start, end = uniform(3, count, seed=1), uniform(3, count, seed=2)
    end[:, ::5] = start[:, ::5]  # spheres
    radius = 0.3 + 0.25 * uniform(count, seed=3)
    origin, aim = 2.5 * uniform(3, count, seed=4), start + 0.6 * uniform(3, count, seed=5)
    direction = (aim - origin) * (uniform(count, seed=6) - 0.2)  # of any length, and a good half of them away from it
    found = intersect(origin, direction, start, end, radius)
    speed = direction.norm(dim=0)
    steps = torch.linspace(-8, 8, 1601).double()[:, None] / speed
    along = distance((origin[:, None] + steps * direction[:, None]), start[:, None], end[:, None], radius)
    low = along.amin(0)
    safe = low.abs() > 0.01
    hit = low < 0
    assert 80 < hit.sum() < 320 and torch.equal((found < torch.inf)[safe], hit[safe])
    # A line enters a capsule once: bisect where it does.
    entered = (along < 0).int().argmax(0)
    here, outside, inside = (
        hit & safe,
        *(steps.gather(0, row[None])[0] for row in ((entered - 1).clamp_min(0), entered)),
    )
    for _ in range(40):
        middle = (outside + inside) / 2
        within = distance(origin + middle * direction, start, end, radius) < 0
        outside, inside = torch.where(within, outside, middle), torch.where(within, middle, inside)
    torch.testing.assert_close(found[here], inside[here], atol=1e-9, rtol=1e-9)
    assert (found[here] < 0).any() and (found[here] > 0).any()  # behind the origin, and before it


def test_a_ray_along_the_axis_meets_the_end_that_comes_first():
    low, high, up = vector(0, 1, 0), vector(0, 2, 0), vector(0, 1, 0)
    radius = torch.tensor(0.25).double()
    origin = vector(0, 0, 0)
    assert intersect(origin, up, low, high, radius) == 0.75 == intersect(origin, up, high, low, radius)
    assert intersect(2 * up + high, -up, low, high, radius) == 1.75
    assert intersect(vector(0.15, 0, 0), up, low, high, radius) == pytest.approx(0.8)  # beside the axis
    assert intersect(vector(0.26, 0, 0), up, low, high, radius) == math.inf
    assert intersect(5 * up, up, low, high, radius) == -4.25  # behind
    assert intersect(1.5 * up, up, low, high, radius) == -0.75  # from within: where the line came in


def test_distances_are_counted_in_directions_from_the_origin():
    start, end = vector(-0.5, 0.1, 2), vector(0.7, -0.2, 3)
    origin, direction, radius = vector(0.1, 0.2, 0), vector(0.05, -0.1, 1), torch.tensor(0.3).double()
    found = intersect(origin, direction, start, end, radius).item()
    assert 1 < found < 3
    for offset in (-4.0, 0.5, 20.0):
        moved = intersect(origin + offset * direction, direction, start, end, radius).item()
        assert moved == pytest.approx(found - offset, abs=1e-12)
    assert intersect(origin, 4 * direction, start, end, radius).item() == pytest.approx(found / 4, abs=1e-12)
    assert intersect(origin, direction, end, start, radius).item() == pytest.approx(found, abs=1e-12)


def test_single_precision_is_enough_however_nearly_a_ray_is_along_the_axis(distance):
    """Where the quadratic for the round wall loses all its digits, the ends still stop the ray."""
    tilt = torch.logspace(-9, -1, 400).double()
    start = torch.stack([torch.zeros_like(tilt), torch.zeros_like(tilt), torch.full_like(tilt, -0.4)])
    end = start + 0.4 * torch.stack([tilt.sin(), torch.zeros_like(tilt), -tilt.cos()])
    for offset in (0.0, 0.03, 0.059):
        origin, direction = vector(offset, 0.01, 0)[:, None].expand(3, 400), vector(0, 0, -1)[:, None].expand(3, 400)
        exact = intersect(origin, direction, start, end, torch.tensor(0.06).double())
        single = intersect(*(value.float() for value in (origin, direction, start, end)), torch.tensor(0.06))
        assert (exact < torch.inf).any() or offset == 0.059
        assert torch.equal(exact < torch.inf, single < torch.inf)
        hit = exact < torch.inf
        surface = distance(origin + exact * direction, start, end, torch.tensor(0.06).double())[hit]
        assert surface.abs().max() < 1e-7
        assert (single[hit] - exact[hit]).abs().max() < 2e-3


def test_normals_point_from_the_axis(distance, uniform):
    start, end, point = uniform(3, 50, seed=1), uniform(3, 50, seed=2), 2 * uniform(3, 50, seed=3)
    start[:, :10] = end[:, :10]
    point.requires_grad_()
    radius = distance(point, start, end, torch.zeros(()))
    slope = torch.autograd.grad(radius.sum(), point)[0]
    torch.testing.assert_close(normals(point.detach(), start, end, radius.detach()), slope)


def test_boxes_hold_the_image_of_their_cube(uniform):
    center = uniform(3, 60, seed=6) - vector(0, 0, 0.7)[:, None]
    radius = 0.05 + 0.4 * uniform(60, seed=7).abs()
    left, right, bottom, top = box(center, radius, FOCAL)
    share = uniform(3, 500, 60, seed=8)
    share[:, :100] = share[:, :100].sign()  # corners
    point = center[:, None] + radius * share
    seen = -point[2] > NEAR
    assert 10000 < seen.sum() < 29000
    for value, low, high in ((point[0], left, right), (point[1], bottom, top)):
        place = FOCAL * value / -point[2]
        assert ((place >= low - 1e-9) & (place <= high + 1e-9))[seen].all()
    ahead = box(vector(0, 0, -3), torch.tensor(1.0).double(), FOCAL)
    assert [value.item() for value in ahead] == [-1.5, 1.5, -1.5, 1.5]  # the front side, 2 before the camera


def test_fragments_by_hand():
    # Cells' centres lie at -0.75, -0.25, 0.25, 0.75. The second scene's box holds the two cells on top in the middle.
    left, right = vector([-0.3, -9], [0.2, -0.3]), vector([0.3, 9], [0.1, 0.3])
    bottom, top = vector([0.2, -0.8], [-1, 0.5]), vector([0.3, -0.7], [1, 2])
    ray, index = fragments(left, right, bottom, top, 4)
    assert index.tolist() == [0, 0, 1, 1, 1, 1, 3, 3]
    assert ray.tolist() == [5, 6, 12, 13, 14, 15, 16 + 1, 16 + 2]


def test_fragments_are_the_cells_within_each_box(uniform):
    side, low, high = 7, *(1.4 * uniform(2, 3, 20, 2, seed=10)).sort(0).values
    low[0, 0], high[0, 0] = -50.0, 50.0  # holds the image
    ray, index = fragments(low[..., 0], high[..., 0], low[..., 1], high[..., 1], side)
    cells = rays(side)[:2] * FOCAL
    within = torch.ones(3, 20, side * side, dtype=torch.bool)
    for axis in (0, 1):
        within &= (cells[axis] >= low[..., axis, None]) & (cells[axis] <= high[..., axis, None])
    expected = {(b * 20 + n, b * side**2 + cell) for b, n, cell in within.nonzero().tolist()}
    assert len(ray) == len(expected) > 500 and set(zip(index.tolist(), ray.tolist(), strict=True)) == expected
    assert (index.diff() >= 0).all()


def test_nearest_takes_the_least_depth_and_on_a_tie_the_first():
    depth, ray = torch.tensor([3.0, 2.0, 2.0, torch.inf, 1.0, 5.0, torch.inf]), torch.tensor([0, 0, 0, 1, 4, 4, 4])
    assert nearest(depth, ray, 6).tolist() == [1, 4]
    assert nearest(depth[:0], ray[:0], 6).tolist() == []


def test_boxes_lose_no_hit():
    """An image of drawn scenes against every ray cast at every capsule."""
    side, scenes = 40, [draw_scene((3, 1, index)) for index in range(10)]
    bodies = set_stage(scenes).seen
    hits = cast(bodies, side, FOCAL)
    direction = directions(torch.arange(side * side), side, FOCAL)[:, None]
    found = torch.full((len(scenes) * side * side,), torch.inf)
    found[hits.ray] = hits.depth
    for b in range(len(scenes)):
        there = (bodies.radius[b] > 0).nonzero().squeeze(1)
        start, end = (ends[:, b, there, None].float() for ends in (bodies.start, bodies.end))
        ahead = -start[2]
        depth = ahead + intersect(direction * ahead, direction, start, end, bodies.radius[b, there, None].float())
        best, which = depth.masked_fill(depth <= NEAR, torch.inf).min(0)
        own = found[b * side**2 : (b + 1) * side**2]
        assert torch.equal(own, best)
        hit = hits.ray // side**2 == b
        winner = hits.capsule[hit] - b * bodies.radius.shape[1]
        ties = (depth[:, hits.ray[hit] % side**2] == hits.depth[hit]).sum(0) > 1
        assert torch.equal(winner[~ties], there[which[hits.ray[hit] % side**2]][~ties])
    assert 1000 < len(hits.ray) < 14000


def test_the_nearest_capsule_wins_whatever_the_order():
    near, far = (0.0, 0.0, -2.6), (0.05, 0.0, -3.4)
    for ends, winner in (((near, far), 0), ((far, near), 1)):
        points = vector(*ends).T[:, None]
        hits = cast(Capsules(points, points, torch.full((1, 2), 0.3).double()), 32, FOCAL)
        ray = (hits.ray == 16 * 32 + 16).nonzero().item()
        assert hits.capsule[ray] == winner


@pytest.mark.parametrize("radius", [0.0, 0.3])
def test_what_is_nothing_or_behind_the_camera_meets_no_ray(radius):
    z = -3.0 if radius == 0 else 3.0
    assert len(cast_one((0.0, 0.0, z), (0.1, 0.1, z), radius, side=33)[1].ray) == 0
