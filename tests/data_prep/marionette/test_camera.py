"""Projection by hand, and cameras against what they are told to look at."""

import math

import pytest
import torch

from data_prep.marionette.raycast import place_cameras, to_pixels
from data_prep.marionette.scene import Camera


@pytest.fixture
def views(scene, person):
    """The cameras of scenes of one kind, all with the first person's head at (0.1, 1.5, 0.2)."""

    def place(*cameras, kind="one"):
        heads = torch.tensor([0.1, 1.5, 0.2], dtype=torch.float64)[:, None].expand(3, len(cameras))
        return place_cameras([scene(person(), kind=kind, camera=camera) for camera in cameras], heads)

    return place


def project(cameras, *points, resolution=64):
    """Pixels (N,2) of points in the world, all seen by every camera: (B,N,2)."""
    world = torch.tensor(points, dtype=torch.float64).T[:, None].expand(3, cameras.axes.shape[-1], len(points))
    return to_pixels(cameras.to_camera(world), resolution)


def assert_pixels(found, *expected):
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_camera_in_front_by_hand(views):
    # At (0, 0.9, 3): a unit at the origin is half of the image, a unit at z = 1 three quarters.
    found = project(views(Camera()), (0, 0.9, 0), (0.3, 1.2, 0), (-0.2, 0.9, 1), (0, 0, -3))
    assert_pixels(
        found[0],
        (31.5, 31.5),
        (1.3 / 2 * 64 - 0.5, 0.7 / 2 * 64 - 0.5),
        (0.7 / 2 * 64 - 0.5, 31.5),
        (31.5, 1.45 / 2 * 64 - 0.5),
    )


def test_pixel_centres_lie_at_integers(views):
    # The left edge of the image is half a pixel to the left of pixel 0's centre, the right one right of the last.
    camera = views(Camera())
    for resolution in (1, 64, 100):
        corners = project(camera, (-1, 1.9, 0), (1, -0.1, 0), resolution=resolution)
        assert_pixels(corners[0], (-0.5, -0.5), (resolution - 0.5, resolution - 0.5))


def test_yaw_walks_around_to_the_right_and_elevation_climbs(views):
    turned = views(Camera(yaw=math.pi / 2), Camera(elevation=0.1))
    expected = torch.tensor([[3, 0.9, 0], [0, 0.9 + 3 * math.sin(0.1), 3 * math.cos(0.1)]], dtype=torch.float64)
    torch.testing.assert_close(turned.position.T, expected, atol=1e-12, rtol=0)
    # From the side of +x, what lies at -z is on the right.
    assert_pixels(project(turned, (0, 0.9, -0.25))[0], (1.25 / 2 * 64 - 0.5, 31.5))
    # From above, what is farther off on the ground is higher up in the image.
    ground = project(turned, (0, 0, 0), (0, 0, -1))[1, :, 1]
    assert ground[1] < ground[0] < 64


def test_axes_are_a_right_handed_frame_and_the_horizon_is_level(views):
    axes = views(*[Camera(yaw, 0.3 * math.sin(yaw), 2.0) for yaw in torch.linspace(-3, 3, 13).tolist()]).axes
    right, up, back = axes
    for a, b, c in ((right, up, back), (up, back, right)):
        torch.testing.assert_close(torch.linalg.cross(a, b, dim=0), c, atol=1e-12, rtol=0)
    torch.testing.assert_close(axes.norm(dim=1), torch.ones(3, 13).double())
    assert right[1].abs().max() == 0 and up[1].min() > 0.9


@pytest.mark.parametrize("yaw", [-2.0, 0.0, 0.7])
def test_the_point_looked_at_is_in_the_middle_at_its_distance(views, yaw):
    camera = Camera(yaw, 0.1, 2.5, (0.3, 0.8))
    aim = 0.3 * math.cos(yaw), 0.8, -0.3 * math.sin(yaw)
    found = views(camera)
    assert_pixels(project(found, aim)[0], (31.5, 31.5))
    assert (found.position[:, 0] - torch.tensor(aim)).norm() == pytest.approx(2.5, abs=1e-6)
    # Which moves the origin to the left.
    assert project(found, (0, 0.8, 0))[0, 0, 0] == pytest.approx((1 - 0.3 * 3 / 2.5) * 32 - 0.5, abs=0.1)


def test_a_portrait_is_aimed_from_the_head(views):
    found = views(Camera(0.4, 0, 1.0, (0.1, -0.05)), kind="portrait")
    aim = 0.1 + 0.1 * math.cos(0.4), 1.5 - 0.05, 0.2 - 0.1 * math.sin(0.4)
    assert_pixels(project(found, aim)[0], (31.5, 31.5))
    assert (found.position[:, 0] - torch.tensor(aim)).norm() == pytest.approx(1.0, abs=1e-6)


def test_each_scene_has_its_own_camera_whatever_the_shape_of_the_points(views):
    cameras = [Camera(0.3, 0.1, 2.0), Camera(-1.0, -0.1, 3.0, (0.2, 0.5))]
    both = views(*cameras)
    points = torch.randn(3, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for b, camera in enumerate(cameras):
        alone = views(camera)
        assert torch.equal(both.to_camera(points)[:, b], alone.to_camera(points[:, b : b + 1])[:, 0])
        assert torch.equal(both.turn(points)[:, b], alone.turn(points[:, b : b + 1])[:, 0])
    difference = both.to_camera(points) - both.to_camera(points * 0)
    torch.testing.assert_close(both.turn(points), difference)  # a vector has no place
