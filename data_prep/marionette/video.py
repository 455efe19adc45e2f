"""Videos of marionettes: the people of one scene in smooth motion under a moving camera, with exact surface tracks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from numpy.random import Generator, SeedSequence, default_rng
from torch import Tensor

from data_prep.marionette.raycast import to_pixels
from data_prep.marionette.render import Stills, render_scenes
from data_prep.marionette.scene import FOCAL, KINDS, Camera, Person, Scene
from data_prep.marionette.scene_sampling import draw_pose, draw_scene
from data_prep.marionette.stage import CAPSULE_INSTANCE, Stage, first_depth, set_stage
from rg.points import inside

BEAT = 16  # frames from one drawn pose to the next
ORBIT, ZOOM, STEP = (
    0.5,
    0.12,
    0.25,
)  # of the camera: radians and share of its distance; of a person per beat: world units
VIDEO_STREAM = 0x71DE0  # keeps the draws of a video's motion apart from those of its first scene
SURFACE = 0.005  # world units within which the front-most surface counts as the tracked one


@dataclass(frozen=True)
class Clip:
    """A video of T frames.

    stills: the T frames and their labels.
    tracks: (T,N,2) float32 (x, y) in pixels, N points on the surfaces of people followed through all frames, also
        where they are hidden or outside of the image.
    visible: (T,N) bool, whether the point is the front-most surface at its place in the image.
    instances: (N,) uint8, whose surface: i for the i-th person.
    """

    stills: Stills
    tracks: Tensor
    visible: Tensor
    instances: Tensor


def _ease(share: float) -> float:
    return share * share * (3 - 2 * share)


def _between(poses: Sequence[Mapping[str, float]], time: float) -> dict[str, float]:
    """The pose at a time in beats; every angle moves smoothly from one drawn pose to the next."""
    beat = min(int(time), len(poses) - 2)
    share, first, second = _ease(time - beat), poses[beat], poses[beat + 1]
    return {name: first[name] + share * (second[name] - first[name]) for name in first}


def _near(yaw: float, other: float) -> float:
    """`yaw` in the turn nearest to `other`: nobody spins around between two poses."""
    return yaw + 2 * math.pi * round((other - yaw) / (2 * math.pi))


def _draw_motion(
    rng: Generator, scene: Scene, person: Person, beats: int
) -> tuple[list[dict[str, float]], list[float]]:
    """The poses at the beats, the first one the scene's, and the places (x and z alternating)."""
    poses, place = [dict(person.pose)], [*person.place]
    for _ in range(beats):
        pose = draw_pose(rng, scene.kind, scene.camera.yaw)
        poses.append(pose | {"yaw": _near(pose["yaw"], poses[-1]["yaw"])})
        reach = 0.0 if scene.kind == "portrait" else STEP
        place += (rng.uniform(-reach, reach, 2) + place[-2:]).tolist()
    return poses, place


def draw_video(seed: tuple[int, ...], frames: int, kinds: Mapping[str, float] = KINDS) -> list[Scene]:
    """The scenes of one video's frames, from `seed` alone; frame 0 is the scene that `draw_scene` draws from it.

    A longer video of the same seed begins with the frames of a shorter one of as many beats.
    """
    first = draw_scene(seed, kinds)
    rng = default_rng(SeedSequence((VIDEO_STREAM, *seed)))
    beats = max(1, math.ceil((frames - 1) / BEAT))
    turn, zoom, phase = rng.uniform(-ORBIT, ORBIT), rng.uniform(-ZOOM, ZOOM), rng.uniform(0.6, 1.2)
    motions = [_draw_motion(rng, first, person, beats) for person in first.people]
    scenes = []
    for frame in range(frames):
        time = frame / BEAT
        swing = math.sin(phase * time)
        camera: Camera = replace(
            first.camera,
            yaw=first.camera.yaw + turn * swing,
            distance=first.camera.distance * (1 + zoom * swing),
        )
        beat, people = min(int(time), beats - 1), []
        for person, (poses, place) in zip(first.people, motions, strict=True):
            share = _ease(time - beat)
            x, z = (place[2 * beat + i] + share * (place[2 * beat + 2 + i] - place[2 * beat + i]) for i in (0, 1))
            people.append(replace(person, pose=_between(poses, time), place=(x, z)))
        scenes.append(replace(first, camera=camera, people=tuple(people)))
    return scenes


def _surface_points(stage: Stage, instances: Tensor, count: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """Draws surface points of people: capsules (count,) and places in their frames (3,count).

    Args:
        stage: of one video's T scenes. instances: (T,H,W) label maps, from which the pixels are drawn.
    """
    side = instances.shape[-1]
    occupied = instances.nonzero()
    capsules, places = [], []
    # A pixel that belongs mostly to a person may be missed at a point within it: draw again, but not for ever.
    for _ in range(20):
        frame, row, column = occupied[torch.from_numpy(rng.integers(len(occupied), size=count))].unbind(1)
        jitter = torch.from_numpy(rng.uniform(-0.5, 0.5, (2, count)))
        u, v = (column + jitter[0] + 0.5) / side * 2 - 1, 1 - (row + jitter[1] + 0.5) / side * 2
        ray = torch.stack([u / FOCAL, v / FOCAL, -torch.ones_like(u)])
        rays = torch.zeros(3, len(instances), count, dtype=torch.float64)
        rays[2] = -1
        rays[:, frame, torch.arange(count)] = ray
        depth, capsule = (table[frame, torch.arange(count)] for table in first_depth(stage, rays, glasses=True))
        hit = (CAPSULE_INSTANCE[capsule] > 0) & (depth < torch.inf)
        offset = ray * depth - stage.seen.start[:, frame, capsule]
        place = torch.stack([(axis[:, frame, capsule] * offset).sum(0) for axis in stage.frames])
        capsules.append(capsule[hit])
        places.append(place[:, hit])
        if sum(map(len, capsules)) >= count:
            break
    capsule, place = torch.cat(capsules), torch.cat(places, 1)
    order = torch.arange(count) % len(capsule)
    return capsule[order], place[:, order]


def _follow(stage: Stage, capsule: Tensor, place: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Where surface points are in each of T scenes, (T,N,2) pixels, and whether they are seen, (T,N)."""
    start = stage.seen.start[:, :, capsule]
    axes = stage.frames[:, :, :, capsule]
    points = start + sum(axes[i] * place[i] for i in range(3))
    pixels = to_pixels(points, resolution)
    front, _ = first_depth(stage, points, glasses=True)
    seen = (-points[2] - front < SURFACE) & inside(pixels, (resolution, resolution)) & (points[2] < 0)
    return pixels.float(), seen


def render_clip(
    scenes: Sequence[Scene],
    *,
    seed: tuple[int, ...],
    points: int,
    resolution: int = 64,
    supersampling: int = 2,
    device: str | torch.device = "cpu",
) -> Clip:
    """Renders T given scenes, such as some of `draw_video`, as one video.

    Args:
        scenes: of the frames, T >= 1.
        seed: draws the points that are followed.
        points: N >= 1 points, drawn from the people's pixels in all frames.
        resolution, supersampling, device: as of `render`.

    Raises:
        ValueError: no person is in the image in any of the scenes.
    """
    stills = render_scenes(scenes, resolution=resolution, supersampling=supersampling, device=device)
    if not stills.instances.any():
        raise ValueError(f"no person is in the image in any of {len(scenes)} frames of the video of seed {seed}")
    stage = set_stage(scenes)
    rng = default_rng(SeedSequence((VIDEO_STREAM + 1, *seed)))
    capsule, place = _surface_points(stage, stills.instances, points, rng)
    pixels, seen = _follow(stage, capsule, place, resolution)
    return Clip(stills, pixels, seen, CAPSULE_INSTANCE[capsule].to(torch.uint8))
