"""The distribution of scenes: its frequencies, ranges and captions."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from data_prep.marionette.scene import COLORS, GROUNDS, KINDS, POSE, SKIES, Person, Scene, draw_scene

PLAIN = {
    "shirt": "red",
    "trousers": "blue",
    "skin": "tan",
    "hair": "black",
    "eye": "green",
    "hat": None,
    "glasses": False,
}


def person(*, scale=1.0, place=(0.0, -0.9), identity=PLAIN, **pose):
    return Person(identity, dict.fromkeys(POSE, 0.0) | pose, scale, place)


def scene(*people, kind="one"):
    return Scene(kind, "day", "grass", -0.2, 0.0, people)


@pytest.fixture(scope="module")
def drawn():
    return [draw_scene((6, 0, index), KINDS) for index in range(2500)]


def test_kinds_and_attributes_have_their_frequencies(drawn):
    def check(flags, probability):
        flags = list(flags)
        sigma = math.sqrt(probability * (1 - probability) / len(flags))
        assert sum(flags) / len(flags) == pytest.approx(probability, abs=4 * sigma + 1e-9)

    people = [someone for one in drawn for someone in one.people]
    standing = [someone for one in drawn if one.kind != "portrait" for someone in one.people]
    for kind, probability in KINDS.items():
        check((one.kind == kind for one in drawn), probability)
    check((someone.identity["hat"] is not None for someone in people), 0.3)
    check((someone.identity["glasses"] for someone in people), 0.25)
    check((someone.pose["yaw"] > 1.5 for someone in standing), 0.15)
    for color in COLORS:
        check((someone.identity["shirt"] == color for someone in people), 1 / 8)
    for sky in SKIES:
        check((one.sky == sky for one in drawn), 1 / 4)
    assert {draw_scene((6, 1, i), {"portrait": 1.0}).kind for i in range(20)} == {"portrait"}


# Written out, not read from the module: the embedded model was trained on these numbers.
ANGLES = {
    "yaw": (-1.2, 1.2), "lean_roll": (-0.15, 0.15), "lean_pitch": (-0.2, 0.2), "head_roll": (-0.25, 0.25),
    "head_pitch": (-0.2, 0.3), "head_yaw": (-0.6, 0.6), "arm_spread": (0.1, 2.6), "arm_swing": (-1.2, 0.6),
    "elbow": (0, 1.9), "elbow_twist": (-0.4, 0.4), "leg_spread": (0, 0.6), "leg_swing": (-1.1, 0.6), "knee": (0, 1.3),
}  # fmt: skip
PLACES = {  # per kind and person: scale, x, y
    ("one", 0): ((0.85, 1.08), (-0.3, 0.3), (-0.93, -0.87)),
    ("two", 0): ((0.62, 0.85), (-0.57, -0.33), (-0.93, -0.87)),
    ("two", 1): ((0.62, 0.85), (0.33, 0.57), (-0.93, -0.87)),
    ("portrait", 0): ((2.6, 3.4), (-0.15, 0.15), (-0.05, 0.25)),
}


def assert_uniform(values, low, high, name):
    values, width = np.array(values), high - low
    margin = 12 / len(values) * width  # missed by either end of a uniform sample once in 160,000
    assert low <= values.min() < low + margin and high - margin < values.max() <= high, name
    assert abs(values.mean() - (low + high) / 2) < 4.5 * width / math.sqrt(12 * len(values)), name


def test_every_number_is_uniform_in_its_range(drawn):
    assert_uniform([one.horizon for one in drawn], -0.45, -0.05, "horizon")
    assert_uniform([one.light_x for one in drawn], -0.7, 0.7, "light")
    for name in POSE:
        values = [one.people[0].pose[name] for one in drawn if one.kind == "one"]
        values = [value - math.pi if name == "yaw" and value > 1.2 else value for value in values]
        assert_uniform(values, *ANGLES[name.removeprefix("right_").removeprefix("left_")], name)
    assert_uniform([one.people[0].pose["yaw"] for one in drawn if one.kind == "portrait"], -0.9, 0.9, "portrait yaw")
    for (kind, index), ranges in PLACES.items():
        people = [one.people[index] for one in drawn if one.kind == kind]
        for axis, limits in enumerate(ranges):
            assert_uniform([(one.scale, *one.place)[axis] for one in people], *limits, (kind, index, axis))


def test_prompts_name_the_clothes_and_the_place(drawn):
    hat, other = PLAIN | {"hat": "green"}, PLAIN | {"shirt": "white", "trousers": "black"}
    two = replace(scene(person(identity=hat), person(identity=other), kind="two"), sky="dusk")
    first, second = "a person in a red shirt and blue trousers", "a person in a white shirt and black trousers"
    assert scene(person()).prompt == f"{first} on grass at day"
    assert two.prompt == f"{first} and a green hat and {second} on grass at dusk"
    portrait = scene(person(identity=hat), kind="portrait")
    assert portrait.prompt == "a portrait of a person in a red shirt and a green hat at day"
    for one in drawn[:500]:
        words = one.prompt.split()
        garments = ("shirt", "hat") if one.kind == "portrait" else ("shirt", "trousers", "hat")
        said = [f"{someone.identity[g]} {g}" for someone in one.people for g in garments if someone.identity[g]]
        assert [f"{a} {b}" for a, b in pairwise(words) if a in COLORS] == said
        assert words[-1] == one.sky and (one.kind == "portrait") == (not set(words) & set(GROUNDS))


def test_every_word_of_a_prompt_is_a_token_of_the_embedded_model(drawn, tokenizer):
    words = {word for one in drawn for word in one.prompt.split()}
    assert len(words) > 25
    assert all(tokenizer.tokenize(word) == [f"{word}</w>"] and f"{word}</w>" in tokenizer.get_vocab() for word in words)
