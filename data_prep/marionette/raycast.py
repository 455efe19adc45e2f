"""An exact ray-caster for capsules, in the axes of a camera at the origin that looks along -z: x right, y up.

A ray goes through (u, v, -1), u and v being image coordinates over the focal length, so that the distance along a ray
is the depth in front of the camera. Only pairs of a ray and a capsule whose box on the image holds it are computed,
all of them at once. The arithmetic is element-wise and the nearest hit is a minimum, so that a scene gets the same bits
whatever shares its batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.marionette.scene import FOCAL, Scene

NEAR = 0.05  # world units in front of the camera from which on things are seen


@dataclass(frozen=True)
class Capsules:
    """B scenes of N capsules each, in world units; radius 0 is no capsule.

    start, end: (3,B,N) ends of the axes, equal for a sphere. radius: (B,N).
    """

    start: Tensor
    end: Tensor
    radius: Tensor


@dataclass(frozen=True)
class Hits:
    """What the rays of B scenes meet first; rays that meet nothing are left out, H remain.

    ray: (H,) row-major index in 0..B*side*side-1. capsule: (H,) index in 0..B*N-1. depth: (H,) float32 world units.
    point: (3,H) where. normal: (3,H) outward unit normals.
    """

    ray: Tensor
    capsule: Tensor
    depth: Tensor
    point: Tensor
    normal: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of vectors (3, ...), its three terms added in order."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def intersect(origin: Tensor, direction: Tensor, start: Tensor, end: Tensor, radius: Tensor) -> Tensor:
    """How many `direction`s along a ray a capsule begins; everything broadcasts.

    A ray meets the round wall if the quadratic a t^2 + 2 b t + c for its distance from the axis has a root there, else
    the sphere at the nearer end.

    Args:
        origin, direction: (3, ...), the rays. start, end: (3, ...). radius: (...).

    Returns:
        (...), inf for a miss; negative behind the origin.
    """
    axis, offset = end - start, origin - start
    along, length = dot(axis, direction), dot(axis, axis)
    square, across = dot(direction, direction), dot(direction, offset)
    before = dot(axis, offset)
    a = length * square - along * along
    b = length * across - before * along
    c = length * (dot(offset, offset) - radius * radius) - before * before
    root = b * b - a * c
    wall = (-b - root.clamp_min(0).sqrt()) / a.clamp_min(1e-12)
    share = before + wall * along
    # A ray along the axis, and any ray at a sphere, has no wall to meet.
    flat = a > 1e-9 * length * square
    end_first = torch.where(flat, share > 0, along < 0) & (length > 0)
    offset = torch.where(end_first, origin - end, offset)
    across = dot(direction, offset)
    cap = across * across - square * (dot(offset, offset) - radius * radius)
    cap_hit = torch.where(cap > 0, (-across - cap.clamp_min(0).sqrt()) / square, torch.inf)
    on_wall = flat & (share > 0) & (share < length)
    return torch.where(flat & (root <= 0), torch.inf, torch.where(on_wall, wall, cap_hit))


def normals(point: Tensor, start: Tensor, end: Tensor, radius: Tensor) -> Tensor:
    """Outward unit normals (3, ...) of capsules at points on their surface."""
    axis, offset = end - start, point - start
    share = (dot(axis, offset) / dot(axis, axis).clamp_min(1e-12)).clamp(0, 1)
    return (offset - share * axis) / radius


def box(center: Tensor, radius: Tensor, focal: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Left, right, bottom and top, in halves of the image, of what holds the image of a cube around a center.

    Args:
        center: (3, ...) in the camera's axes. radius: (...), half the cube's side; what is nearer than NEAR is cut off.
    """
    near = (-center[2] - radius).clamp_min(NEAR)
    far = (-center[2] + radius).clamp_min(NEAR)

    def span(middle: Tensor) -> tuple[Tensor, Tensor]:
        low, high = middle - radius, middle + radius
        return focal * torch.minimum(low / near, low / far), focal * torch.maximum(high / near, high / far)

    return *span(center[0]), *span(center[1])


def fragments(left: Tensor, right: Tensor, bottom: Tensor, top: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Every pair of a box and a ray in it, of `side` x `side` rays per scene through cells' centres, row 0 on top.

    Args:
        left, right, bottom, top: (B,N) in halves of the image; an empty box has right < left.

    Returns:
        row-major indices of rays (M,) in 0..B*side*side-1 and of boxes (M,) in 0..B*N-1, ordered by box.
    """

    def span(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        first = ((low + 1) / 2 * side - 0.5).clamp(-1, side).ceil().clamp_min(0)
        last = ((high + 1) / 2 * side - 0.5).clamp(-1, side).floor().clamp_max(side - 1)
        return first.long().flatten(), (last - first + 1).clamp_min(0).long().flatten()

    scenes, boxes = left.shape
    first_column, width = span(left, right)
    first_row, height = span(-top, -bottom)
    count = width * height
    scene = torch.arange(scenes, device=count.device).repeat_interleave(boxes)
    corner = (scene * side + first_row) * side + first_column
    index = torch.repeat_interleave(count)
    order = torch.arange(len(index), device=count.device) - (count.cumsum(0) - count)[index]
    row = order // width[index]
    return corner[index] + order + row * (side - width[index]), index


def nearest(depth: Tensor, ray: Tensor, rays: int) -> Tensor:
    """Which of M fragments each of `rays` rays meets first, on a tie the one listed first; depth and ray are (M,)."""
    best = depth.new_full((rays,), torch.inf).scatter_reduce(0, ray, depth, "amin")
    front = ((depth == best[ray]) & (depth < torch.inf)).nonzero().squeeze(1)
    first = ray.new_full((rays,), len(ray)).scatter_reduce(0, ray[front], front, "amin")
    return first[first < len(ray)]


def directions(ray: Tensor, side: int, focal: float) -> Tensor:
    """The rays of these indices, (3,M) float32."""
    centers = ((torch.arange(side, device=ray.device) + 0.5) / side * 2 - 1) / focal
    x, y = centers[ray % side], -centers[ray // side % side]
    return torch.stack([x, y, torch.full_like(x, -1)])


def cast(bodies: Capsules, side: int, focal: float) -> Hits:
    """Casts `side` x `side` rays at each scene's capsules, given in the camera's axes."""
    ends = [box(end, bodies.radius, focal) for end in (bodies.start, bodies.end)]
    left, right, bottom, top = (
        choose(a, b) for choose, a, b in zip((torch.minimum, torch.maximum) * 2, *ends, strict=True)
    )
    there = (bodies.radius > 0) & (torch.minimum(-bodies.start[2], -bodies.end[2]) > NEAR)
    ray, capsule = fragments(left, torch.where(there, right, left - 3), bottom, top, side)
    start, end = (ends.float().flatten(1)[:, capsule] for ends in (bodies.start, bodies.end))
    radius = bodies.radius.float().flatten()[capsule]
    direction = directions(ray, side, focal)
    # Measured from beside the capsule, where single precision is finest.
    ahead = -start[2]
    depth = ahead + intersect(direction * ahead, direction, start, end, radius)
    front = nearest(torch.where(depth > NEAR, depth, torch.inf), ray, len(bodies.radius) * side * side)
    point = direction[:, front] * depth[front]
    normal = normals(point, start[:, front], end[:, front], radius[front])
    return Hits(ray[front], capsule[front], depth[front], point, normal)


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

    def to_camera(self, points: Tensor) -> Tensor:
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
    """Points (3,...) in the camera's axes as (...,2) pixels (x, y) of an image of side `resolution`."""
    u, v = FOCAL * points[0] / -points[2], FOCAL * points[1] / -points[2]
    return torch.stack([(u + 1) / 2 * resolution - 0.5, (1 - v) / 2 * resolution - 0.5], -1)
