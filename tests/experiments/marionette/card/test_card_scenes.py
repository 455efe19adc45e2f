from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.vocabulary import UNSEEN_PAIRS
from experiments.marionette.card.measure import CHANGED, held_out, is_unseen, recolor, recolored_pairs, render_chunks


@pytest.mark.parametrize("name", CHANGED)
def test_pairs_differ_in_one_word_of_the_prompt(name: str):
    pairs = recolored_pairs(5, name, 6)
    for before, after in zip(pairs.before, pairs.after, strict=True):
        words, other = before.prompt.split(), after.prompt.split()
        changed = [(old, new) for old, new in zip(words, other, strict=True) if old != new]
        assert changed == [(before.attributes[name], after.attributes[name])] and changed[0][1] in CHANGED[name]
        assert {k for k, v in before.attributes.items() if after.attributes[k] != v} == {name}
        assert not is_unseen(after.people[0].identity)
    assert pairs.indices == sorted(set(pairs.indices))


def test_the_first_pairs_stay_the_first():
    few, many = recolored_pairs(5, "hat", 2), recolored_pairs(5, "hat", 4)
    assert few.before == many.before[:2] and few.after == many.after[:2] and few.indices == many.indices[:2]


def test_what_the_prompt_does_not_name_is_not_recoloured():
    scene, rng = draw_scene((1, 2, 3), {"one": 1.0}), np.random.default_rng(0)
    person = replace(scene.people[0], names_hair=False)
    person = replace(person, identity={**person.identity, "hat": None})
    bald = replace(scene, people=(person,))
    assert recolor(bald, "hair", rng) is None and recolor(bald, "hat", rng) is None
    assert recolor(bald, "shirt", rng) is not None


def test_a_recoloured_shirt_changes_little_else():
    pairs = recolored_pairs(5, "shirt", 2)
    before, after = (render_chunks(scenes, 32).int() for scenes in (pairs.before, pairs.after))
    changed = (before != after).any(1).float().mean((1, 2))
    assert (changed > 0).all() and (changed < 0.4).all()


def test_held_out_scenes_are_the_same_in_a_longer_run():
    few, many = (held_out(5, "unseen", n, resolution=16, kinds={"one": 1.0}, pairs="unseen") for n in (2, 3))
    assert torch.equal(few.image, many.image[:2]) and few.prompt == many.prompt[:2]
    assert all(UNSEEN_PAIRS[words["shirt"]] == words["trousers"] for words in many.attributes)
