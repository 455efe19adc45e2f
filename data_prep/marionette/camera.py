"""From the world to a camera's axes, and from there to pixels; one owner of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.marionette.scene import FOCAL, Scene


@dataclass(frozen=True)
class Views:
    """The cameras of B scenes, float64.

    axes: (3,3,B), the camera's right, up and backward (its x, y and z) in the world. position: (3,B) in the world.
    """

    axes: Tensor
    position: Tensor

    def turn(self, vectors: Tensor) -> Tensor:
        """World vectors (3,B,...) in the camera's axes."""
        axes = self.axes.view(*self.axes.shape, *[1] * (vectors.ndim - 2))
        return axes[:, 0] * vectors[0] + axes[:, 1] * vectors[1] + axes[:, 2] * vectors[2]

    def see(self, points: Tensor) -> Tensor:
        """World points (3,B,...) in the camera's axes, seen from the camera."""
        return self.turn(points - self.position.view(*self.position.shape, *[1] * (points.ndim - 2)))


def place_cameras(scenes: Sequence[Scene], heads: Tensor) -> Views:
    """The cameras of scenes; heads: (3,B), where the first person's head is."""
    axes, positions = [], []
    for scene, head in zip(scenes, heads.unbind(1), strict=True):
        # Scalar by scalar: a vectorised cosine may depend in its last bit on the length of the array.
        camera = scene.camera
        turn, lift = (
            (math.cos(camera.yaw), math.sin(camera.yaw)),
            (math.cos(camera.elevation), math.sin(camera.elevation)),
        )
        right = torch.tensor([turn[0], 0, -turn[1]], dtype=torch.float64)
        up = torch.tensor([-lift[1] * turn[1], lift[0], -lift[1] * turn[0]], dtype=torch.float64)
        back = torch.tensor([lift[0] * turn[1], lift[1], lift[0] * turn[0]], dtype=torch.float64)
        aim = camera.shift[0] * right + head * (scene.kind == "portrait")
        aim[1] += camera.shift[1]
        axes.append(torch.stack([right, up, back]))
        positions.append(aim + camera.distance * back)
    return Views(torch.stack(axes, -1), torch.stack(positions, -1))


def to_pixels(points: Tensor, resolution: int) -> Tensor:
    """Points (3,...) in the camera's axes as (...,2) pixels (x, y) of a picture of side `resolution`."""
    u, v = FOCAL * points[0] / -points[2], FOCAL * points[1] / -points[2]
    return torch.stack([(u + 1) / 2 * resolution - 0.5, (1 - v) / 2 * resolution - 0.5], -1)
