"""The distribution of scenes: its frequencies, ranges, places and captions."""

import hashlib
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from data_prep.marionette.raycast import to_pixels
from data_prep.marionette.scene import KINDS, PATTERNS, POSE, SHAPE, THING_COUNTS, THINGS, Camera
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.stage import keypoints, set_stage
from data_prep.marionette.vocabulary import COLORS, GROUNDS, HAIRS, LENGTHS, SKIES, SKINS, UNSEEN_PAIRS
from rg.points import KEYPOINTS, inside


def flat(yaw):
    """An angle as one between -pi and pi."""
    return (yaw + math.pi) % (2 * math.pi) - math.pi


def test_a_scene_depends_on_its_seed_alone():
    first = draw_scene((3, 1, 4))
    assert draw_scene((3, 1, 4)) == first
    assert len({draw_scene(seed).phase for seed in ((3, 1, 5), (3, 0, 4), (2, 1, 4), (3, 1, 4))}) == 4


def test_kinds_and_attributes_have_their_frequencies(drawn):
    def check(flags, probability):
        flags = list(flags)
        sigma = math.sqrt(probability * (1 - probability) / len(flags))
        assert sum(flags) / len(flags) == pytest.approx(probability, abs=4 * sigma + 1e-9)

    people = [someone for one in drawn for someone in one.people]
    standing = [(someone, one) for one in drawn if one.kind != "portrait" for someone in one.people]
    for kind, probability in KINDS.items():
        check((one.kind == kind for one in drawn), probability)
    check((someone.identity["hat"] is not None for someone in people), 0.3)
    check((someone.identity["glasses"] for someone in people), 0.25)
    check((someone.names_hair for someone in people), 0.8)
    check((abs(flat(someone.pose["yaw"] - one.camera.yaw)) > 1.5 for someone, one in standing), 0.15)
    for words, name in (
        (COLORS, "shirt"),
        (COLORS, "trousers"),
        (HAIRS, "hair"),
        (LENGTHS, "hair_length"),
        (SKINS, "skin"),
    ):
        for word in words:
            check((someone.identity[name] == word for someone in people), 1 / len(words))
    for pattern, probability in PATTERNS.items():
        check((someone.identity["shirt_pattern"] == pattern for someone in people), probability)
    for sky in SKIES:
        check((one.sky == sky for one in drawn), 1 / 4)
    for ground in GROUNDS:
        check((one.ground == ground for one in drawn), 1 / 4)
    for count, probability in enumerate(THING_COUNTS):
        check((len(one.things) == count for one in drawn), probability)
    assert {thing.kind for one in drawn for thing in one.things} == set(THINGS)
    assert {draw_scene((6, 1, i), {"portrait": 1.0}).kind for i in range(20)} == {"portrait"}


# Written out, not read from the module: the embedded model was trained on these numbers.
ANGLES = {
    "yaw": (-1.3, 1.3), "lean_roll": (-0.2, 0.2), "lean_pitch": (-0.2, 0.35), "head_roll": (-0.25, 0.25),
    "head_pitch": (-0.25, 0.35), "head_yaw": (-0.65, 0.65), "arm_spread": (0.05, 2.75), "arm_swing": (-1.4, 0.7),
    "elbow": (0, 2.1), "elbow_twist": (-0.5, 0.5), "leg_spread": (0, 0.65), "leg_swing": (-1.2, 0.65), "knee": (0, 1.5),
}  # fmt: skip
BUILD = {
    "height": (0.92, 1.06), "leg_length": (0.92, 1.08), "arm_length": (0.92, 1.08), "shoulder_width": (0.86, 1.14),
    "girth": (0.82, 1.2), "limb_girth": (0.85, 1.2), "head_size": (0.92, 1.15), "eye_spacing": (0.8, 1.2),
    "eye_height": (-0.012, 0.016), "nose_size": (0.7, 1.6), "mouth_width": (0.6, 1.5), "mouth_height": (-0.012, 0.014),
    "hair_volume": (0.96, 1.07), "hair_fall": (0.16, 0.34),
}  # fmt: skip
VIEWS = {  # per kind: scale, shift to the right and upwards in halves of the image
    "one": ((0.85, 1.08), (-0.3, 0.3), (0.87, 0.93)),
    "two": ((0.66, 0.88), (-0.1, 0.1), (0.87, 0.93)),
    "portrait": ((2.5, 3.3), (-0.15, 0.15), (-0.25, 0.05)),
}


def assert_uniform(values, low, high, name):
    values, width = np.array(values), high - low
    margin = 12 / len(values) * width  # missed by either end of a uniform sample once in 160,000
    assert low - 1e-9 <= values.min() < low + margin and high - margin < values.max() <= high + 1e-9, name
    assert abs(values.mean() - (low + high) / 2) < 4.5 * width / math.sqrt(12 * len(values)), name


def test_every_number_is_uniform_in_its_range(drawn):
    assert_uniform([one.camera.yaw for one in drawn], -math.pi, math.pi, "camera yaw")
    assert_uniform([one.camera.elevation for one in drawn], -0.11, 0.11, "elevation")
    assert_uniform([one.light[0] - one.camera.yaw for one in drawn], -1.1, 1.1, "light's turn")
    assert_uniform([one.light[1] for one in drawn], 0.6, 1.1, "light's height")
    assert_uniform([one.phase for one in drawn], 0, 1, "phase")
    assert set(BUILD) == set(SHAPE)
    for name, limits in BUILD.items():
        assert_uniform([one.people[0].identity[name] for one in drawn], *limits, name)
    singles = [one for one in drawn if one.kind == "one"]
    for name in POSE:
        values = [one.people[0].pose[name] - one.camera.yaw * (name == "yaw") for one in singles]
        values = [value - math.pi if name == "yaw" and value > 1.3 else value for value in values]
        assert_uniform(values, *ANGLES[name.removeprefix("right_").removeprefix("left_")], name)
    portraits = [one.people[0].pose["yaw"] - one.camera.yaw for one in drawn if one.kind == "portrait"]
    assert_uniform(portraits, -0.9, 0.9, "portrait yaw")
    for kind, ranges in VIEWS.items():
        cameras = [one.camera for one in drawn if one.kind == kind]
        scales = [3 / camera.distance for camera in cameras]
        shifts = [[scale * camera.shift[i] for scale, camera in zip(scales, cameras, strict=True)] for i in (0, 1)]
        for values, limits, name in zip([scales, *shifts], ranges, ("scale", "right", "up"), strict=True):
            assert_uniform(values, *limits, (kind, name))


@pytest.fixture(scope="module")
def points(drawn):
    """Keypoints (1000,2,18,3) of the first drawn scenes in images of 64 pixels."""
    return keypoints(set_stage(drawn[:1000]), 64)


def test_nearly_all_people_have_head_and_feet_in_the_image(drawn, points):
    single = torch.tensor([one.kind == "one" for one in drawn[:1000]])
    names = {
        "head": ("nose", "left_eye", "right_ear"),
        "feet": ("right_ankle", "left_ankle"),
        "middle": ("neck", "left_hip"),
    }
    within = {
        name: inside(points[single, 0][:, [KEYPOINTS.index(point) for point in found], :2], (64, 64))
        .all(1)
        .float()
        .mean()
        for name, found in names.items()
    }
    assert within["head"] > 0.99 and within["feet"] > 0.92 and within["middle"] == 1
    lowest = points[single, 0, :, 1].amax(1)
    assert lowest.quantile(0.02) > 50  # and nobody floats or is far off


def test_portraits_show_the_face_and_two_people_stand_side_by_side(drawn, points):
    portrait = torch.tensor([one.kind == "portrait" for one in drawn[:1000]])
    nose = points[portrait, 0, KEYPOINTS.index("nose")]
    assert inside(nose[:, :2], (64, 64)).float().mean() > 0.99 and nose[:, 2].mean() > 0.85
    assert (points[portrait, 0, 8:14, 2] == 0).float().mean() > 0.9  # no hips, knees, ankles
    pair = torch.tensor([one.kind == "two" for one in drawn[:1000]])
    assert torch.equal(pair, points[:, 1].abs().sum((1, 2)) > 0)
    neck = points[pair, :, KEYPOINTS.index("neck"), 0]
    assert (neck[:, 1] - neck[:, 0]).min() > 10  # the first person is on the left
    assert inside(points[pair][:, :, :2, :2], (64, 64)).float().mean() > 0.98
    assert {len(one.people) for one in drawn if one.kind != "two"} == {1}


def test_things_stand_in_sight_and_leave_the_people_room(drawn):
    places, offside = [], []
    for one in drawn:
        for thing in one.things:
            sine, cosine = math.sin(one.camera.yaw), math.cos(one.camera.yaw)
            x, z = thing.place
            places.append((thing.kind, one.kind, -(x * sine + z * cosine)))  # behind the people
            stage = set_stage([replace(one, things=())])
            ground = stage.views.to_camera(torch.tensor([[x], [0.0], [z]], dtype=torch.float64))[:, 0]
            offside.append(abs((to_pixels(ground, 64)[0].item() - 31.5) / 32))
        if len(places) > 300:
            break
    behind = np.array([back for *_, back in places])
    assert ((behind >= 0.7) & (behind <= 5) | (behind >= -0.8) & (behind <= -0.4)).all()
    front = {(thing, kind) for thing, kind, back in places if back < 0}
    assert front and {thing for thing, _ in front} <= {"ball", "rock"} and "portrait" not in {kind for _, kind in front}
    assert np.mean(np.array(offside) < 1.3) > 0.7


def test_unseen_pairs_are_drawn_only_where_asked_for(drawn):
    def clothes(scenes):
        return [(one.identity["shirt"], one.identity["trousers"]) for scene in scenes for one in scene.people]

    seen = set(clothes(drawn))
    assert seen == {(shirt, trousers) for shirt in COLORS for trousers in COLORS if UNSEEN_PAIRS[shirt] != trousers}
    unseen = clothes(draw_scene((6, 2, index), pairs="unseen") for index in range(200))
    assert set(unseen) == set(UNSEEN_PAIRS.items())


def test_prompts_name_the_clothes_and_the_place(drawn, scene, person):
    hat, other = (
        person(worn={"hat": "green", "hair_length": "long"}),
        person(worn={"shirt": "white", "trousers": "black"}),
    )
    first, second = "a person with long black hair in a red shirt", "a person with short black hair in a white shirt"
    two = scene(hat, other, kind="two", sky="dusk").prompt
    assert (
        two == f"two people on grass at dusk {first} and blue trousers and a green hat and {second} and black trousers"
    )
    unnamed = replace(hat, names_hair=False)
    assert scene(unnamed).prompt == "a person in a red shirt and blue trousers and a green hat on grass at day"
    assert scene(hat, kind="portrait").prompt == f"a portrait of {first} and a green hat at day"
    for one in drawn[:500]:
        words = one.prompt.split()
        garments = ("shirt", "hat") if one.kind == "portrait" else ("shirt", "trousers", "hat")
        said = [f"{someone.identity[g]} {g}" for someone in one.people for g in garments if someone.identity[g]]
        assert [f"{a} {b}" for a, b in pairwise(words) if b in ("shirt", "trousers", "hat")] == said
        hair = [f"{x.identity['hair_length']} {x.identity['hair']} hair" for x in one.people if x.names_hair]
        assert [" ".join(words[i - 2 : i + 1]) for i, word in enumerate(words) if word == "hair"] == hair
        assert one.sky in words and (one.kind == "portrait") == (not set(words) & set(GROUNDS))


@pytest.mark.parametrize(
    ("yaw", "head_yaw", "camera", "seen"),
    [
        (0, 0, 0, True),
        (1.3, 0, 0, False),
        (1.3, -0.5, 0, True),
        (0.8, 0.65, 0, False),
        (math.pi, 0, 0, False),
        (math.pi, 0, math.pi, True),
        (0, 0, 1.5, False),
        (-6.2, 0, 0, True),
    ],
)
def test_glasses_are_named_when_they_face_the_camera(scene, person, yaw, head_yaw, camera, seen):
    one = scene(person(worn={"glasses": True}, yaw=yaw, head_yaw=head_yaw), camera=Camera(yaw=camera))
    assert ("glasses" in one.prompt.split()) == (one.attributes["glasses"] == "yes") == seen


def test_sided_scenes_differ_in_nothing_but_words_and_own_limbs(drawn, sided):
    def plain(someone):
        own = {f"{side}_{limb}" for side in ("right", "left") for limb in ("sleeve", "leg")}
        identity = {name: value for name, value in someone.identity.items() if name not in own}
        return replace(someone, identity=identity, names_facing=False)

    assert not any(someone.names_facing for one in drawn for someone in one.people)
    assert [replace(one, people=tuple(map(plain, one.people))) for one in sided] == drawn


def test_own_limbs_are_of_one_side_and_of_another_colour(sided):
    people = [someone.identity for one in sided for someone in one.people]
    found = {f"{side}_{limb}": 0 for side in ("right", "left") for limb in ("sleeve", "leg")}
    for worn in people:
        own = [name for name in found if name in worn]
        assert len({name.split("_")[0] for name in own}) <= 1
        for name in own:
            found[name] += 1
            assert worn[name] in COLORS and worn[name] != worn["shirt" if name.endswith("sleeve") else "trousers"]
            if name.endswith("sleeve"):
                assert UNSEEN_PAIRS[worn[name]] != worn["trousers"]
            else:
                assert UNSEEN_PAIRS[worn["shirt"]] != worn[name]
    sigma = math.sqrt(0.125 * 0.875 / len(people))
    assert all(count / len(people) == pytest.approx(0.125, abs=4 * sigma) for count in found.values())


@pytest.mark.parametrize(
    ("yaw", "camera", "said"),
    [
        (0, 0, "front"), (0.68, 0, "front"), (0.7, 0, None), (0.87, 0, None), (0.89, 0, "right"), (-0.89, 0, "left"),
        (math.pi, 0, "back"), (-math.pi / 2, 0, "left"), (0, math.pi / 2, "left"), (1, 1, "front"), (7, 0, None),
    ],
)  # fmt: skip
def test_the_prompt_says_which_way_a_person_faces_unless_it_is_between_two(scene, person, yaw, camera, said):
    one = scene(replace(person(yaw=yaw), names_facing=True), camera=Camera(yaw=camera))
    turned = f" facing {said}" if said else ""
    assert one.prompt == f"a person{turned} with short black hair in a red shirt and blue trousers on grass at day"
    assert "facing" not in scene(person(yaw=yaw), camera=Camera(yaw=camera)).prompt


@pytest.mark.parametrize(("word", "sign"), [("left", -1), ("right", 1)])
def test_left_and_right_are_those_of_the_image(scene, person, word, sign):
    nose, neck = KEYPOINTS.index("nose"), KEYPOINTS.index("neck")
    for yaw in np.linspace(math.pi / 4 + 0.11, 3 * math.pi / 4 - 0.11, 9):
        one = scene(replace(person(yaw=sign * yaw), names_facing=True))
        found = keypoints(set_stage([one]), 64)[0, 0, :, 0]
        assert f"facing {word} " in one.prompt and sign * (found[nose] - found[neck]) > 1


def test_scenes_that_are_not_sided_are_what_they_were():
    """What the shipped model was trained on: a digest of scenes and prompts as they were before there were sides."""
    fields = ("identity", "pose", "place", "phase", "names_hair")
    drawn = [draw_scene((7001, 0, index)) for index in range(200)]
    people = [[getattr(someone, name) for name in fields] for one in drawn for someone in one.people]
    rest = [(one.kind, one.sky, one.ground, one.camera, one.light, one.things, one.phase, one.prompt) for one in drawn]
    assert hashlib.sha256(repr((people, rest)).encode()).hexdigest()[:16] == "8db0ed0e44d4be4e"
