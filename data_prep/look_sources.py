"""Rendered groups for heads that read what things look like: an anchor, a positive, and an exact negative."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.random import SeedSequence, default_rng

from data_prep.groups import SourceGroup
from data_prep.marionette import KINDS, VERSION, render_scenes
from data_prep.marionette.draw import draw_scene
from data_prep.marionette.scene import FOCAL, SHAPE, Person, Scene
from data_prep.sources import Skip
from data_prep.video_sources import draw_clip
from rg.samples import SPLITS

LOOK_STREAM = 0x100C5  # keeps the draws of other scenes apart from that of the anchor
FACE_STREAM = 0xFACE5  # keeps the draw of a face's frame apart from that of its scene
# Of faces: picture halves per world unit, how far from the centre in picture halves, the turn against the camera in
# radians, and the share of all other angles of a pose that is left.
FACE_SCALE, FACE_SHIFT, FACE_YAW, FACE_POSE = (4.0, 4.6), 0.08, 0.35, 0.3
# What of a person can change without moving a surface.
COAT = ("shirt", "trousers", "skin", "hair", "eye", "shirt_pattern", "trousers_pattern")


class MarionetteLooks:
    """Endless rendered videos: a frame, another one, and the first in the same pose with another appearance.

    An edit of the first is asked for the last picture's appearance: the captions of this world name every colour, and
    an edit under its own would keep them.

    Args:
        seed: of the world; the group at an index depends on (seed, split, index) alone.
        resolution: side of the pictures in pixels.
        kinds: probabilities of the kinds of scene, keys of data_prep.marionette.KINDS.
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
        other = draw_scene((LOOK_STREAM, *seed), {clip[0].kind: 1.0})
        return [clip[0], clip[-1], other_look(clip[0], other)]

    def read(self, split: str, indices: Sequence[int]) -> list[SourceGroup | Skip]:
        return [self._read((self.seed, SPLITS.index(split), index)) for index in indices]

    def _read(self, seed: tuple[int, ...]) -> SourceGroup | Skip:
        scenes = self.scenes(seed)
        stills = render_scenes(scenes, resolution=self.resolution, supersampling=2)
        if not stills.instances.flatten(1).any(1).all():
            return Skip(f"no person is in one of the pictures of seed {seed}")
        return SourceGroup(
            name=f"pictures of seed {seed}",
            images=stills.image[:2],
            prompt=stills.prompt[0],
            kind=stills.kind[0],
            edit_prompt=stills.prompt[-1],
            negatives=stills.image[2:],
            seed=seed,
            identity=stills.identity[0],
        )


class MarionetteFaces(MarionetteLooks):
    """Endless faces: a person, the same one in another place, turn and light, a look-alike, and a stranger.

    A look-alike is dressed, coloured and named in the same words; build and eyes are another's. A stranger shares
    nothing but by chance. No person is in two groups. Faces fill most of a picture and look towards the camera, as in
    the tightly cropped ones of Luo et al. (2024): their readouts are compared place by place.
    """

    def scenes(self, seed: tuple[int, ...]) -> list[Scene]:
        """Anchor, positive, look-alike and stranger."""
        anchor, elsewhere, third, stranger = (draw_face((LOOK_STREAM + number, *seed)) for number in range(4))
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


def other_look(scene: Scene, other: Scene) -> Scene:
    """A scene with the coats, ground and sky of another one of its kind; no surface moves."""
    people = []
    for person, model in zip(scene.people, other.people, strict=True):
        coat = {name: model.identity[name] for name in COAT} | {
            "hat": person.identity["hat"] and model.identity["shirt"]
        }
        people.append(replace(person, identity=person.identity | coat, phase=model.phase))
    return replace(scene, people=tuple(people), sky=other.sky, ground=other.ground, phase=other.phase)


def _with(scene: Scene, person: Person) -> Scene:
    """A portrait of another person, in the pose of the one who was there."""
    return replace(scene, people=(replace(person, pose=scene.people[0].pose, place=scene.people[0].place),))
