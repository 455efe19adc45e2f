"""Images, pairs of frames and triplets that the renderer draws: endless, each from its seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.random import SeedSequence, default_rng

from data_prep.marionette.render import render, render_scenes
from data_prep.marionette.scene import FOCAL, KINDS, SHAPE, VERSION, Person, Scene
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.video import draw_video, render_clip
from data_prep.records import Skip, SourceGroup, SourceSample
from data_prep.sources.folders import GAPS, draw_pair
from rg.data.samples import SPLITS

PROMPT_STREAM = 0x0711  # keeps prompts without pictures apart from those of renders
PAIR_STREAM = 0xFA125  # keeps the draw of a pair apart from that of its video


def draw_clip(seed: tuple[int, ...], kinds: Mapping[str, float]) -> list[Scene]:
    """The scenes from the first to the last frame of a pair in the video of `seed`."""
    first, last = draw_pair(default_rng(SeedSequence((PAIR_STREAM, *seed))), GAPS[1] + 1, GAPS)
    return draw_video(seed, GAPS[1] + 1, kinds)[first : last + 1]


def head_turn(first: Scene, last: Scene) -> float | None:
    """Degrees by which the first person's head turns sideways before the camera; None where it is no portrait."""
    if first.kind != "portrait":
        return None
    one, other = (
        scene.people[0].pose["yaw"] + scene.people[0].pose["head_yaw"] - scene.camera.yaw for scene in (first, last)
    )
    return abs(math.degrees(other - one))


class MarionettePairs:
    """Endless rendered videos, of each a pair of frames, with exact tracks of points on the people's surfaces.

    Args:
        seed: of the world; the pair at an index depends on (seed, split, index) alone.
        resolution: side of the images in pixels.
        kinds: probabilities of the kinds of scene, keys of data_prep.marionette.scene.KINDS.
        points: how many are followed, on what is seen in one of the two frames at least.
        clips: give the frames between the two as well, which a tracker needs.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        resolution: int = 64,
        kinds: Mapping[str, float] = KINDS,
        points: int = 96,
        clips: bool = False,
    ) -> None:
        self.seed, self.resolution, self.kinds = seed, resolution, dict(kinds)
        self.points, self.clips = points, clips

    def describe(self, split: str) -> dict[str, Any]:
        return {"crop": "none", "world": VERSION}

    def count(self, split: str) -> None:
        return None

    def read(self, split: str, indices: Sequence[int]) -> list[SourceGroup | Skip]:
        return [self._read((self.seed, SPLITS.index(split), index)) for index in indices]

    def _read(self, seed: tuple[int, ...]) -> SourceGroup | Skip:
        scenes = draw_clip(seed, self.kinds)
        scenes = scenes if self.clips else [scenes[0], scenes[-1]]
        try:
            clip = render_clip(scenes, seed=seed, points=self.points, resolution=self.resolution)
        except ValueError as error:
            return Skip(str(error))
        points = torch.cat([clip.tracks, clip.visible[..., None]], -1)
        return SourceGroup(
            name=f"video of seed {seed}",
            images=clip.stills.image,
            prompt=clip.stills.prompt[0],
            kind=clip.stills.kind[0],
            points=points[[0, -1]].transpose(0, 1),
            mask=clip.stills.instances[0] > 0,
            turn=head_turn(scenes[0], scenes[-1]),
            seed=seed,
            identity=clip.stills.identity[0],
        )


APPEARANCE_STREAM = 0x100C5  # keeps the draws of other scenes apart from that of the anchor
FACE_STREAM = 0xFACE5  # keeps the draw of a face's frame apart from that of its scene
# Of faces: image halves per world unit, how far from the centre in image halves, the turn against the camera in
# radians, and the share of all other angles of a pose that is left.
FACE_SCALE, FACE_SHIFT, FACE_YAW, FACE_POSE = (4.0, 4.6), 0.08, 0.35, 0.3
# What of a person can change without moving a surface.
APPEARANCE = ("shirt", "trousers", "skin", "hair", "eye", "shirt_pattern", "trousers_pattern")


class AppearanceTriplets:
    """Endless rendered videos: a frame, another one, and the first in the same pose with another appearance.

    An edit of the first is asked for the last image's appearance: the captions of this world name every colour, and
    an edit under its own would keep them.

    Args:
        seed: of the world; the group at an index depends on (seed, split, index) alone.
        resolution: side of the images in pixels.
        kinds: probabilities of the kinds of scene, keys of data_prep.marionette.scene.KINDS.
    """

    def __init__(self, *, seed: int = 0, resolution: int = 64, kinds: Mapping[str, float] = KINDS) -> None:
        self.seed, self.resolution, self.kinds = seed, resolution, dict(kinds)

    def describe(self, split: str) -> dict[str, Any]:
        return {"crop": "none", "world": VERSION}

    def count(self, split: str) -> None:
        return None

    def scenes(self, seed: tuple[int, ...]) -> list[Scene]:
        """Anchor, positive and negative."""
        clip = draw_clip(seed, self.kinds)
        other = draw_scene((APPEARANCE_STREAM, *seed), {clip[0].kind: 1.0})
        return [clip[0], clip[-1], other_appearance(clip[0], other)]

    def read(self, split: str, indices: Sequence[int]) -> list[SourceGroup | Skip]:
        return [self._read((self.seed, SPLITS.index(split), index)) for index in indices]

    def _read(self, seed: tuple[int, ...]) -> SourceGroup | Skip:
        scenes = self.scenes(seed)
        stills = render_scenes(scenes, resolution=self.resolution, supersampling=2)
        if not stills.instances.flatten(1).any(1).all():
            return Skip(f"no person is in one of the images of seed {seed}")
        return SourceGroup(
            name=f"images of seed {seed}",
            images=stills.image[:2],
            prompt=stills.prompt[0],
            kind=stills.kind[0],
            edit_prompt=stills.prompt[-1],
            negatives=stills.image[2:],
            seed=seed,
            identity=stills.identity[0],
        )


class IdentityTriplets(AppearanceTriplets):
    """Endless faces: a person, the same one in another place, turn and light, a look-alike, and a stranger.

    A look-alike is dressed, coloured and named in the same words; build and eyes are another's. A stranger shares
    nothing but by chance. No person is in two groups. Faces fill most of an image and look towards the camera, as in
    the tightly cropped ones of Luo et al. (2024): their readouts are compared place by place.
    """

    def scenes(self, seed: tuple[int, ...]) -> list[Scene]:
        """Anchor, positive, look-alike and stranger."""
        anchor, elsewhere, third, stranger = (draw_face((APPEARANCE_STREAM + number, *seed)) for number in range(4))
        person, other = anchor.people[0], third.people[0]
        build = {name: other.identity[name] for name in (*SHAPE, "eye")}
        lookalike = replace(person, identity=person.identity | build)
        return [anchor, _with(elsewhere, person), _with(third, lookalike), stranger]


def draw_face(seed: tuple[int, ...]) -> Scene:
    """A portrait seen from near by, of someone who looks towards the camera with the arms down."""
    scene = draw_scene(seed, {"portrait": 1.0})
    rng = default_rng(SeedSequence((FACE_STREAM, *seed)))
    scale, shift = rng.uniform(*FACE_SCALE), rng.uniform(-FACE_SHIFT, FACE_SHIFT, 2)
    camera = replace(scene.camera, distance=FOCAL / scale, shift=(shift[0] / scale, shift[1] / scale))
    (person,) = scene.people
    pose = {name: FACE_POSE * angle for name, angle in person.pose.items()}
    pose["yaw"] = camera.yaw + rng.uniform(-FACE_YAW, FACE_YAW)
    return replace(scene, camera=camera, people=(replace(person, pose=pose),))


def other_appearance(scene: Scene, other: Scene) -> Scene:
    """A scene with the clothes and colours, ground and sky of another one of its kind; no surface moves."""
    people = []
    for person, model in zip(scene.people, other.people, strict=True):
        dress = {name: model.identity[name] for name in APPEARANCE} | {
            "hat": person.identity["hat"] and model.identity["shirt"]
        }
        people.append(replace(person, identity=person.identity | dress, phase=model.phase))
    return replace(scene, people=tuple(people), sky=other.sky, ground=other.ground, phase=other.phase)


def _with(scene: Scene, person: Person) -> Scene:
    """A portrait of another person, in the pose of the one who was there."""
    return replace(scene, people=(replace(person, pose=scene.people[0].pose, place=scene.people[0].place),))


class MarionettePrompts:
    """The captions of scenes that are never drawn; see data_prep.sources.sampled.Prompts.

    Args:
        seed, kinds: as of MarionetteSource.
    """

    def __init__(self, *, seed: int = 0, kinds: Mapping[str, float] = KINDS) -> None:
        self.seed, self.kinds = seed, dict(kinds)

    def at(self, split: str, index: int) -> str:
        return draw_scene((PROMPT_STREAM, self.seed, SPLITS.index(split), index), self.kinds).prompt


class MarionetteSource:
    """Endless renders of jointed people; the image at an index depends on (seed, split, index) alone.

    Args:
        seed: of the world.
        resolution: side of the images in pixels.
        kinds: probabilities of the kinds of scene, keys of data_prep.marionette.scene.KINDS.
    """

    def __init__(self, *, seed: int = 0, resolution: int = 64, kinds: Mapping[str, float] = KINDS) -> None:
        self.seed = seed
        self.resolution = resolution
        self.kinds = dict(kinds)

    def describe(self, split: str) -> dict[str, Any]:
        return {"crop": "none", "world": VERSION}

    def count(self, split: str) -> None:
        return None

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]:
        seeds = [(self.seed, SPLITS.index(split), index) for index in indices]
        stills = render(seeds, resolution=self.resolution, kinds=self.kinds)
        return [
            SourceSample(
                image=stills.image[row],
                prompt=stills.prompt[row],
                kind=stills.kind[row],
                seed=seed,
                identity=stills.identity[row],
                keypoints=stills.keypoints[row, : len(stills.identity[row])],
                depth=stills.depth[row],
                edges=stills.edges[row],
            )
            for row, seed in enumerate(seeds)
        ]
