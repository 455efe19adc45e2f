"""The vocabulary against what scenes say, and attributes against what people wear."""

import math
from dataclasses import replace

import pytest

from data_prep.marionette.scene import Scene
from data_prep.marionette.vocabulary import (
    ATTRIBUTES,
    COLORS,
    SIDED_VOCABULARY,
    UNSEEN_PAIRS,
    VOCABULARY,
    describe_person,
    describe_scene,
    facing,
    read_person,
)


def test_prompts_hold_the_words_of_the_vocabulary_and_no_others(drawn):
    words = {word for one in drawn for word in one.prompt.split()}
    assert words == set(VOCABULARY) and len(VOCABULARY) == len(words)
    assert all(
        word.isalpha() and word.islower() for word in VOCABULARY
    )  # one token each, whatever the tokenizer splits


def test_no_prompt_is_longer_than_46_words(drawn, scene, person):
    dressed = person(worn={"hat": "green", "glasses": True, "hair_length": "long"})
    longest = scene(dressed, dressed, kind="two").prompt.split()
    assert max(len(one.prompt.split()) for one in drawn) <= len(longest) <= 46


def test_a_person_in_words(person):
    worn = person(worn={"hat": "green", "hair_length": "long"}).identity
    assert describe_person(worn, portrait=False, glasses=True, hair=True) == (
        "a person with long black hair in a red shirt and blue trousers and a green hat and glasses"
    )
    assert describe_person(worn | {"hat": None}, portrait=True, glasses=False, hair=False) == "a person in a red shirt"


def test_a_scene_in_words():
    assert describe_scene(["A", "B"], kind="two", ground="road", sky="dusk") == "two people on road at dusk A and B"
    assert describe_scene(["A"], kind="portrait", ground="road", sky="day") == "a portrait of A at day"
    assert describe_scene(["A"], kind="one", ground="road", sky="day") == "A on road at day"


def test_every_colour_has_one_unseen_partner():
    assert set(UNSEEN_PAIRS) == set(UNSEEN_PAIRS.values()) == set(COLORS)
    assert all(shirt != trousers for shirt, trousers in UNSEEN_PAIRS.items())


def test_colours_of_one_kind_of_thing_can_be_told_apart():
    values = list(COLORS.values())
    gaps = [
        max(abs(a - b) for a, b in zip(one, other, strict=True)) for one in values for other in values if one != other
    ]
    assert min(gaps) > 40


def test_attributes_of_a_person_are_what_is_worn(person):
    worn = person(worn={"hat": "green", "glasses": True}).identity
    everything = {"shirt": "red", "trousers": "blue", "hat": "green", "glasses": "yes", "hair": "black"}
    assert read_person(worn, portrait=False, glasses=True) == everything | {"hair_length": "short"}
    portrait = read_person(worn | {"hat": None}, portrait=True, glasses=False)
    assert "trousers" not in portrait and portrait["hat"] == "none" and portrait["glasses"] == "no"


def expected_attributes(one: Scene):
    values = {"people": "two" if len(one.people) == 2 else "one", "sky": one.sky}
    values["portrait"] = "yes" if one.kind == "portrait" else "no"
    if one.kind != "portrait":
        values["ground"] = one.ground
    for prefix, someone in zip(("", "second_"), one.people, strict=False):
        for name in ("shirt", "trousers", "hat", "hair", "hair_length"):
            if name != "trousers" or one.kind != "portrait":
                values[prefix + name] = someone.identity[name] or "none"
        # Glasses are the one attribute that depends on the view: what the prompt says of them.
        said = one.prompt.split(" a person ")[1:] if one.kind == "two" else [one.prompt]
        values[f"{prefix}glasses"] = "yes" if "glasses" in said[prefix == "second_"] else "no"
    return values


def test_attributes_of_drawn_scenes_are_all_that_applies_and_known_values(drawn):
    for one in drawn:
        assert one.attributes == expected_attributes(one)
        assert all(value in ATTRIBUTES[name] for name, value in one.attributes.items())
    assert {name: {one.attributes.get(name) for one in drawn} - {None} for name in ATTRIBUTES} == {
        name: set(values) for name, values in ATTRIBUTES.items()
    }


def test_sided_prompts_hold_the_words_of_their_vocabulary_and_no_others(sided):
    words = {word for one in sided for word in one.prompt.split()}
    assert words == set(SIDED_VOCABULARY) and len(SIDED_VOCABULARY) == len(words)
    assert all(word.isalpha() and word.islower() for word in SIDED_VOCABULARY)


def test_no_sided_prompt_is_longer_than_69_words(sided, scene, person):
    worn = {"hat": "green", "glasses": True, "left_sleeve": "blue", "left_leg": "white"}
    dressed = replace(person(worn=worn), names_facing=True)
    longest = scene(dressed, dressed, kind="two").prompt.split()
    assert max(len(one.prompt.split()) for one in sided) <= len(longest) == 69


@pytest.mark.parametrize(
    ("degrees", "word"),
    [
        (0, "front"), (44, "front"), (-44, "front"), (46, "right"), (134, "right"), (136, "back"), (180, "back"),
        (-136, "back"), (-134, "left"), (-46, "left"), (360, "front"), (-450, "left"), (810, "right"),
    ],
)  # fmt: skip
def test_a_turn_in_a_word(degrees, word):
    assert facing(math.radians(degrees)) == word


def test_a_sided_person_in_words(person):
    worn = person(worn={"left_sleeve": "green", "left_leg": "white", "hat": "black"}).identity
    assert describe_person(worn, portrait=False, glasses=False, hair=True, facing="back") == (
        "a person facing back with short black hair in a red shirt with a green left sleeve and blue trousers with a "
        "white left leg and a black hat"
    )
    assert describe_person(worn, portrait=True, glasses=False, hair=False, facing="left") == (
        "a person facing left in a red shirt with a green left sleeve and a black hat"
    )
