"""What a marionette scene is made of, the ranges of all that varies, and the draw of one scene from a seed.

World units: a person is about 1.7 units tall. x and z span the ground, y points up. Angles are in radians, turns about
y are right-handed (a yaw of 0 faces +z). The shipped diffusion model was trained on exactly this distribution.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.marionette.vocabulary import describe_person, describe_scene, facing, read_person

VERSION = 3  # of the world: another number means other images for the same seeds
Range = tuple[float, float]
Pairs = Literal["seen", "unseen"]
FOCAL = 3.0  # focal length in halves of the image's side: the image sees 18 degrees to each side
# How often each kind of scene is drawn, and how large its people are: image halves per world unit at their place.
KINDS: dict[str, float] = {"one": 0.68, "two": 0.17, "portrait": 0.15}
SCALES: dict[str, Range] = {"one": (0.85, 1.08), "two": (0.66, 0.88), "portrait": (2.5, 3.3)}
MAX_PEOPLE = 2
# Every angle of a pose and its range; "spread" lifts a limb sideways, "swing" turns it about the axis through the hips.
# Yaw is relative to the camera's.
POSE: dict[str, Range] = {
    "yaw": (-1.3, 1.3), "lean_roll": (-0.2, 0.2), "lean_pitch": (-0.2, 0.35),
    "head_roll": (-0.25, 0.25), "head_pitch": (-0.25, 0.35), "head_yaw": (-0.65, 0.65),
} | {
    f"{side}_{angle}": limits
    for side in ("right", "left")
    for angle, limits in {
        "arm_spread": (0.05, 2.75), "arm_swing": (-1.4, 0.7), "elbow": (0.0, 2.1), "elbow_twist": (-0.5, 0.5),
        "leg_spread": (0.0, 0.65), "leg_swing": (-1.2, 0.65), "knee": (0.0, 1.5),
    }.items()
}  # fmt: skip
PORTRAIT_YAW: Range = (-0.9, 0.9)
# The build of a body and of a face, as factors of the average unless a unit is given.
SHAPE: dict[str, Range] = {
    "height": (0.92, 1.06), "leg_length": (0.92, 1.08), "arm_length": (0.92, 1.08), "shoulder_width": (0.86, 1.14),
    "girth": (0.82, 1.2), "limb_girth": (0.85, 1.2), "head_size": (0.92, 1.15), "eye_spacing": (0.8, 1.2),
    "eye_height": (-0.012, 0.016), "nose_size": (0.7, 1.6), "mouth_width": (0.6, 1.5), "mouth_height": (-0.012, 0.014),
    "hair_volume": (0.96, 1.07), "hair_fall": (0.16, 0.34),
}  # fmt: skip  # eye and mouth height and the fall of long hair: world units
ELEVATION: Range = (-0.11, 0.11)  # of the camera above the point that it looks at
LIGHT_TURN, LIGHT_HEIGHT = (
    (-1.1, 1.1),
    (0.6, 1.1),
)  # of the light: turn against the camera's yaw, angle above the ground
BACK_VIEW_SHARE, HAT_SHARE, GLASSES_SHARE, NAMED_HAIR_SHARE = 0.15, 0.3, 0.25, 0.8
# Of people in scenes that are sided: whose prompt says which way they face, who has a sleeve and who a trouser leg in a
# colour of its own. Who stands so near to the border of two quarters (radians) is said to face neither.
NAMED_FACING_SHARE, OWN_LIMB_SHARE, FACING_MARGIN = 0.9, 0.25, 0.1
PATTERNS: dict[str, float] = {"plain": 0.55, "stripes": 0.15, "checks": 0.15, "patches": 0.15}  # of shirts and trousers
THINGS: dict[str, Range] = {
    "ball": (0.1, 0.2),
    "rock": (0.12, 0.25),
    "bush": (0.25, 0.5),
    "post": (0.6, 1.3),
    "tree": (1.5, 2.4),
}
THING_COUNTS: tuple[float, ...] = (0.6, 0.25, 0.1, 0.05)  # how often a scene has 0, 1, 2, 3 things
MAX_THINGS = len(THING_COUNTS) - 1
FRONT_SHARE = 0.25  # of the balls and rocks lie between the camera and the people


@dataclass(frozen=True)
class Person:
    """One person.

    Attributes:
        identity: words for shirt, trousers, skin, hair, hair_length, eye, hat (or None); glasses (bool); the numbers of
            SHAPE; shirt_pattern and trousers_pattern (keys of PATTERNS). Where a sleeve or a trouser leg has a colour
            of its own, a word for right_sleeve, left_sleeve, right_leg or left_leg too: the person's own sides.
        pose: the angles of POSE, yaw in the world.
        place: (x, z) of the pelvis on the ground.
        phase: shifts the textures of this person's parts.
        names_hair: whether the prompt names the hair.
        names_facing: whether the prompt names which way the body faces.
    """

    identity: dict[str, Any]
    pose: dict[str, float]
    place: tuple[float, float] = (0.0, 0.0)
    phase: float = 0.0
    names_hair: bool = True
    names_facing: bool = False


@dataclass(frozen=True)
class Thing:
    """An object on the ground: a key of THINGS, its size in world units, its place (x, z), a ball's colour in words."""

    kind: str
    size: float
    place: tuple[float, float]
    color: str = "red"


@dataclass(frozen=True)
class Camera:
    """A camera on a sphere around the point that it looks at.

    Attributes:
        yaw: about y; at 0 it looks along -z.
        elevation: angle above that point.
        distance: from that point, world units.
        shift: of that point to the camera's right and upwards, world units, from the world's origin, or in a portrait
            from the head of the first person.
    """

    yaw: float = 0.0
    elevation: float = 0.0
    distance: float = 3.0
    shift: tuple[float, float] = (0.0, 0.9)


@dataclass(frozen=True)
class Scene:
    """One scene: a key of KINDS, words for sky and ground, (turn against +z, height) of the light, a shift of the
    textures of ground and sky, the camera, the people, the things."""

    kind: str
    sky: str
    ground: str
    people: tuple[Person, ...]
    camera: Camera = field(default_factory=Camera)
    light: tuple[float, float] = (0.4, 0.8)
    things: tuple[Thing, ...] = ()
    phase: float = 0.0

    def _shows_glasses(self, person: Person) -> bool:
        turn = person.pose["yaw"] + person.pose["head_yaw"] - self.camera.yaw
        return person.identity["glasses"] and math.cos(turn) > 0.35

    def _named_facing(self, person: Person) -> str | None:
        """What the prompt says of where the person's body faces, see vocabulary.facing."""
        turn = person.pose["yaw"] - self.camera.yaw
        off = abs((turn + math.pi / 4) % (math.pi / 2) - math.pi / 4)  # the middle of the quarter
        return facing(turn) if person.names_facing and off < math.pi / 4 - FACING_MARGIN else None

    @property
    def prompt(self) -> str:
        """The caption: what every person wears, as far as it can be seen, and the surroundings.

        Of the pose it says at most which way people face.
        """
        portrait = self.kind == "portrait"
        people = [
            describe_person(
                person.identity,
                portrait=portrait,
                glasses=self._shows_glasses(person),
                hair=person.names_hair,
                facing=self._named_facing(person),
            )
            for person in self.people
        ]
        return describe_scene(people, kind=self.kind, ground=self.ground, sky=self.sky)

    @property
    def attributes(self) -> dict[str, str]:
        """What can be read from the image: those of vocabulary.ATTRIBUTES that apply."""
        portrait = self.kind == "portrait"
        values = {"people": "two" if self.kind == "two" else "one", "portrait": "yes" if portrait else "no"}
        values |= {"sky": self.sky} | ({} if portrait else {"ground": self.ground})
        for prefix, person in zip(("", "second_"), self.people, strict=False):
            words = read_person(person.identity, portrait=portrait, glasses=self._shows_glasses(person))
            values |= {f"{prefix}{name}": value for name, value in words.items()}
        return values
