"""An exact ray-caster for capsules: an orthographic camera that looks along -z at the square [-1, 1] x [-1, 1].

Only pairs of a ray and a capsule whose bounding box holds it are computed, all of them at once. The arithmetic is
element-wise and the nearest hit is a maximum, so that a scene gets the same bits whatever shares its batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Capsules:
    """B scenes of N capsules each, in world units (x right, y up, z towards the camera); radius 0 is no capsule.

    start, end: (3,B,N) ends of the axes, equal for a sphere. radius: (B,N).
    """

    start: Tensor
    end: Tensor
    radius: Tensor


@dataclass(frozen=True)
class Hits:
    """What the rays of B scenes meet first; rays that meet nothing are left out, H remain.

    ray: (H,) row-major index in 0..B*side*side-1. capsule: (H,) index in 0..B*N-1. z: (H,) float32 world units.
    normal: (3,H) outward unit normals.
    """

    ray: Tensor
    capsule: Tensor
    z: Tensor
    normal: Tensor


def surface(start: Tensor, end: Tensor, radius: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays that come down along -z first meet capsules; everything broadcasts.

    A capsule is the union of the spheres centred on its axis. Over the share f of the axis, the front of the sphere
    under the ray, z(f) = f dz + sqrt(r^2 - |p - f d|^2) with p the ray's and d the axis' offset from `start` in the
    picture plane, is concave; its maximum has the closed form below and is clamped to the ends.

    Args:
        start, end: (3, ...). radius: (...). x, y: (...), the rays.

    Returns:
        z (...) of the hit, -inf for a miss, and (3, ...) from the nearest point of the axis to the hit (length radius).
    """
    dx, dy, dz = end - start
    px, py = x - start[0], y - start[1]
    flat = (dx * dx + dy * dy).sqrt().clamp_min(1e-9)
    along, across = (px * dx + py * dy) / flat, (px * dy - py * dx) / flat
    reach = (radius * radius - across * across).clamp_min(0).sqrt()
    share = ((along + reach * dz / (flat * flat + dz * dz).sqrt()) / flat).clamp(0, 1)
    ex, ey = px - share * dx, py - share * dy
    square = radius * radius - ex * ex - ey * ey
    ez = square.clamp_min(0).sqrt()
    return torch.where(square > 0, start[2] + share * dz + ez, -torch.inf), torch.stack([ex, ey, ez])


def fragments(bodies: Capsules, side: int) -> tuple[Tensor, Tensor]:
    """Every pair of a capsule and a ray in its bounding box, of `side` x `side` rays per scene.

    Returns:
        indices of rays (M,) and of capsules (M,) as in Hits, ordered by capsule.
    """
    scenes, capsules = bodies.radius.shape
    low, high = torch.minimum(bodies.start, bodies.end), torch.maximum(bodies.start, bodies.end)

    def span(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        first = ((lower + 1) / 2 * side - 0.5).ceil().clamp_min(0)
        last = ((upper + 1) / 2 * side - 0.5).floor().clamp_max(side - 1)
        return first.long().flatten(), (last - first + 1).clamp_min(0).long().flatten()

    left, width = span(low[0] - bodies.radius, high[0] + bodies.radius)
    top, height = span(-high[1] - bodies.radius, -low[1] + bodies.radius)
    count = width * height * (bodies.radius > 0).flatten()
    scene = torch.arange(scenes, device=count.device).repeat_interleave(capsules)
    corner = (scene * side + top) * side + left
    capsule = torch.repeat_interleave(count)
    order = torch.arange(len(capsule), device=count.device) - (count.cumsum(0) - count)[capsule]
    row = order // width[capsule]
    return corner[capsule] + order + row * (side - width[capsule]), capsule


def nearest(z: Tensor, ray: Tensor, rays: int) -> Tensor:
    """Which of M fragments each of `rays` rays meets first, on a tie the one listed first; z and ray are (M,)."""
    best = z.new_full((rays,), -torch.inf).scatter_reduce(0, ray, z, "amax")
    front = ((z == best[ray]) & (z > -torch.inf)).nonzero().squeeze(1)
    first = ray.new_full((rays,), len(ray)).scatter_reduce(0, ray[front], front, "amin")
    return first[first < len(ray)]


def cast(bodies: Capsules, side: int) -> Hits:
    """Casts `side` x `side` rays through the centres of the cells of each scene's square, row 0 on top."""
    ray, capsule = fragments(bodies, side)
    start, end = (ends.float().flatten(1)[:, capsule] for ends in (bodies.start, bodies.end))
    radius = bodies.radius.float().flatten()[capsule]
    centers = (torch.arange(side, device=ray.device) + 0.5) / side * 2 - 1
    z, offset = surface(start, end, radius, centers[ray % side], -centers[ray // side % side])
    front = nearest(z, ray, len(bodies.radius) * side * side)
    return Hits(ray=ray[front], capsule=capsule[front], z=z[front], normal=offset[:, front] / radius[front])
