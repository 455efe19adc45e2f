"""The renderer against itself in other batches, sizes and devices, and its labels against each other."""

import math
from dataclasses import fields, replace

import pytest
import torch

from data_prep.marionette.materials import backdrop
from data_prep.marionette.raycast import to_pixels
from data_prep.marionette.render import Stills, edges, render
from data_prep.marionette.scene import KINDS, Camera, Thing
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.stage import LABELS, set_stage
from data_prep.marionette.vocabulary import UNSEEN_PAIRS
from rg.points import KEYPOINTS

BEHIND = (0.0, 9.0)  # the camera: a scene always has a person


def image(stills, index):
    """Everything about one image of a batch."""
    return {field.name: getattr(stills, field.name)[index] for field in fields(Stills)}


def assert_same(one, other):
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_a_seed_gives_the_same_bits_in_every_batch():
    seeds = [(0, 1, index) for index in range(19)]
    together, backwards = render(seeds), render(seeds[::-1])
    some = render(seeds[3:10:3], kinds=KINDS)
    for index, seed in enumerate(seeds):
        assert_same(image(together, index), image(render([seed]), 0))
        assert_same(image(together, index), image(backwards, len(seeds) - 1 - index))
    for index in range(3):
        assert_same(image(together, 3 + 3 * index), image(some, index))


def test_splits_and_seeds_are_disjoint():
    seeds = [(seed, split, index) for seed in (0, 1) for split in range(4) for index in range(8)]
    assert len({image.numpy().tobytes() for image in render(seeds, resolution=32).image}) == len(seeds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_renders_the_same_image_up_to_rounding():
    seeds = [(0, 1, index) for index in range(32)]
    here, there = render(seeds), render(seeds, device="cuda")
    assert_same(image(there, 5), image(render(seeds[5:6], device="cuda"), 0))
    for field in fields(Stills):
        one, other = getattr(here, field.name), getattr(there, field.name)
        if not isinstance(one, torch.Tensor):
            assert one == other, field.name
        elif field.name == "keypoints":
            assert torch.equal(one, other)
        else:  # a ray that grazes an outline may fall on either side
            gap = (one.float() - other.float()).abs()
            assert (gap > (1 if field.name == "image" else 1e-4)).float().mean() < 1e-3, field.name


def test_shapes_and_types():
    stills = render([(0, 0, 0), (0, 0, 1)], resolution=24, supersampling=3)
    assert (stills.image.shape, stills.image.dtype) == ((2, 3, 24, 24), torch.uint8)
    assert (stills.keypoints.shape, stills.keypoints.dtype) == ((2, 2, 18, 3), torch.float32)
    assert (stills.depth.shape, stills.depth.dtype) == ((2, 24, 24), torch.float32)
    assert (stills.instances.shape, stills.instances.dtype) == ((2, 24, 24), torch.uint8)
    assert (stills.parts.shape, stills.parts.dtype) == ((2, 24, 24), torch.uint8)
    assert (stills.edges.shape, stills.edges.dtype) == ((2, 24, 24), torch.bool)
    assert [len(people) for people in stills.identity] == [2 if kind == "two" else 1 for kind in stills.kind]
    scenes = [draw_scene((0, 0, index)) for index in range(2)]
    assert stills.prompt == [one.prompt for one in scenes] and stills.attributes == [one.attributes for one in scenes]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seeds": []}, "one seed.* none"),
        ({"resolution": 0}, "resolution.* 1.* 0 and 2$"),
        ({"supersampling": 0}, "supersampling.* 1.* 0$"),
        ({"kinds": {"crowd": 1.0}}, r"kinds.*'one'.*sum to 1.*{'crowd': 1.0}"),
        ({"kinds": {"one": 0.5, "two": 0.4}}, "kinds.*sum to 1.* 0.5, .* 0.4"),
        ({"kinds": {"one": 1.5, "two": -0.5}}, "kinds.*sum to 1.* 1.5, .* -0.5"),
        ({"kinds": {}}, "kinds.*sum to 1.* {}"),
        ({"pairs": "all"}, "pairs.*seen.*unseen.* all"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        render(**({"seeds": [(0, 0, 0)]} | arguments))


def test_pairs_of_colours():
    def clothes(**options):
        stills = render([(2, 0, index) for index in range(24)], resolution=8, supersampling=1, **options)
        return [UNSEEN_PAIRS[one["shirt"]] == one["trousers"] for people in stills.identity for one in people]

    assert not any(clothes()) and all(clothes(pairs="unseen"))


def test_depth_is_larger_nearer_and_nothing_in_the_sky(scene, person, shoot):
    reaching = person(right_arm_swing=-1.2, right_elbow=0.3)
    stills = shoot(scene(reaching, things=(Thing("post", 1.3, (-0.7, -2.0)),)), supersampling=1)
    depth, parts = stills.depth[0], stills.parts[0]
    sky = parts == LABELS.index("sky")
    assert (depth >= 0).all() and (depth[sky] == 0).all() and 500 < sky.sum() < 2500
    ground = depth[:, 63]  # beside the person: falls to the horizon
    assert (ground.diff() >= 0).all() and ground[63] == pytest.approx(1 / (3 * 0.9 * 64 / 63), abs=0.01)
    x, y, _ = stills.keypoints[0, 0, KEYPOINTS.index("right_wrist")].round().int().tolist()
    hip = stills.keypoints[0, 0, KEYPOINTS.index("left_hip")].round().int().tolist()
    post = depth[parts == LABELS.index("thing")]
    assert depth[y, x] > depth[hip[1], hip[0]] > 1 / 3 > post.max()
    assert post.median() == pytest.approx(1 / 4.95, rel=0.01)


def test_depth_and_image_are_averaged_over_the_pixel():
    fine, coarse = (render([(5, 0, 0)], resolution=n, supersampling=128 // n) for n in (128, 32))
    blocks = fine.depth.unflatten(1, (32, 4)).unflatten(3, (32, 4)).mean((2, 4))
    torch.testing.assert_close(coarse.depth, blocks, atol=1e-5, rtol=0)
    colors = fine.image.float().unflatten(2, (32, 4)).unflatten(4, (32, 4)).mean((3, 5))
    assert (coarse.image.float() - colors).abs().max() <= 1.01
    for name, count in (("instances", 3), ("parts", len(LABELS))):
        shares = torch.stack([(getattr(fine, name) == i).float() for i in range(count)])
        shares = shares.unflatten(2, (32, 4)).unflatten(4, (32, 4)).mean((3, 5))
        assert torch.equal(shares.gather(0, getattr(coarse, name)[None].long())[0], shares.amax(0))


def test_labels_agree_with_each_other():
    stills = render([(7, 0, index) for index in range(12)], resolution=96, supersampling=1)
    person = stills.parts > LABELS.index("thing")
    assert torch.equal(person, stills.instances > 0)
    assert torch.equal(stills.parts == LABELS.index("sky"), stills.depth == 0)
    for index, people in enumerate(stills.identity):
        assert set(stills.instances[index].unique().tolist()) <= set(range(len(people) + 1))
    assert torch.equal(stills.edges, edges(stills.depth, stills.parts.int() + 256 * stills.instances.int()))
    boundary = stills.instances[:, :, 1:] != stills.instances[:, :, :-1]
    assert ((stills.edges[:, :, 1:] | stills.edges[:, :, :-1]) | ~boundary).all()
    assert 0.02 < stills.edges.float().mean() < 0.25


def test_edges_of_a_ball_are_its_outline(scene, person, shoot):
    """One pixel wide, on the ball where it stands before the sky and the ground."""
    stills = shoot(scene(person(place=BEHIND), things=(Thing("ball", 0.5, (0.0, 0.0)),)), supersampling=1)
    ball, found = stills.parts[0] == LABELS.index("thing"), stills.edges[0]
    padded = torch.nn.functional.pad(ball, (1, 1, 1, 1))
    within = ball & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
    assert 500 < ball.sum() < 1000 and torch.equal(found & ball, ball & ~within)
    horizon = (found & ~ball).nonzero()
    assert set(horizon[:, 0].tolist()) <= {32} or not len(horizon)  # the first row of the ground


@pytest.mark.parametrize("who", [0, 1])
def test_another_shirt_changes_nothing_but_that_shirt(shoot, who):
    shirt = [LABELS.index(label) for label in ("trunk", "right_upper_arm", "left_upper_arm")]
    for index in range(4):
        one = draw_scene((8, who, index), {"two": 1.0})
        wearer = one.people[who]
        color = "white" if wearer.identity["shirt"] != "white" else "purple"
        people = list(one.people)
        people[who] = replace(wearer, identity=wearer.identity | {"shirt": color})
        before, after = shoot(one), shoot(replace(one, people=tuple(people)))
        for name in ("keypoints", "depth", "instances", "parts", "edges"):
            assert torch.equal(getattr(before, name), getattr(after, name)), name
        cells = shoot(one, resolution=128, supersampling=1)
        worn = torch.isin(cells.parts[0], torch.tensor(shirt)) & (cells.instances[0] == who + 1)
        worn = worn.unflatten(0, (64, 2)).unflatten(2, (64, 2))
        changed = (before.image[0] != after.image[0]).any(0)
        assert not (changed & ~worn.any(3).any(1)).any()
        assert (changed | ~worn.all(3).all(1)).all() and changed.sum() > 20
        key = ("shirt", "second_shirt")[who]
        assert before.attributes[0] | {key: color} == after.attributes[0]


@pytest.mark.parametrize(("kind", "height"), [("rock", 0.3), ("bush", 0.6)])
def test_what_lies_below_the_ground_is_not_seen(scene, person, shoot, kind, height):
    """A sphere that is sunk ends where the ground cuts it, and not where its lowest ray would meet it."""
    size, place = 0.3, (-0.2, 0.0)
    one = scene(person(place=BEHIND), things=(Thing(kind, size, place),), camera=Camera(elevation=0.2))
    stills = shoot(one, supersampling=1, resolution=128)
    front = size * math.sqrt(1 - height**2)  # of the circle in which it meets the ground
    stage = set_stage([one])
    where = stage.views.to_camera(torch.tensor([[place[0]], [0.0], [front]], dtype=torch.float64))
    x, y = to_pixels(where, 128)[0].tolist()
    column = (stills.parts[0, :, round(x)] == LABELS.index("thing")).nonzero()
    assert len(column) > 10 and column.max().item() == pytest.approx(y, abs=1.2)
    ground = 1 / backdrop([one], stage.views, torch.zeros(128 * 128, dtype=torch.bool), 128).depth.view(128, 128)
    assert (stills.depth[0] >= ground - 1e-5).all()


@pytest.mark.parametrize("limb", ["right_sleeve", "left_leg"])
def test_an_own_limb_changes_nothing_but_that_limb(shoot, scene, person, limb):
    side, garment = limb.split("_")
    parts = {"sleeve": ("upper_arm", "forearm"), "leg": ("thigh", "shin")}[garment]
    labels = torch.tensor([LABELS.index(f"{side}_{part}") for part in parts])
    for yaw in (-0.6, 0.0, 0.6, math.pi):
        pose = {"yaw": yaw, "right_arm_spread": 1.0, "left_arm_spread": 1.0}
        one, other = (scene(person(worn=worn, **pose)) for worn in ({}, {limb: "white"}))
        before, after = shoot(one), shoot(other)
        for name in ("keypoints", "depth", "instances", "parts", "edges"):
            assert torch.equal(getattr(before, name), getattr(after, name)), name
        cells = torch.isin(shoot(one, resolution=128, supersampling=1).parts[0], labels).unflatten(0, (64, 2))
        worn = cells.unflatten(2, (64, 2)).any(3).any(1)
        changed = (before.image[0] != after.image[0]).any(0)
        assert not (changed & ~worn).any() and changed.sum() > 30


def test_sided_images_are_those_of_sided_scenes():
    seeds = [(7001, 0, index) for index in range(24)]
    plain, sided = render(seeds), render(seeds, sided=True)
    assert sided.prompt == [draw_scene(seed, sided=True).prompt for seed in seeds] != plain.prompt
    for name in ("keypoints", "depth", "parts"):
        assert torch.equal(getattr(plain, name), getattr(sided, name)), name
    limbs = {f"{side}_{limb}" for side in ("right", "left") for limb in ("sleeve", "leg")}
    own = torch.tensor([any(limbs & set(who) for who in people) for people in sided.identity])
    changed = (plain.image != sided.image).flatten(1).any(1)
    assert not (changed & ~own).any() and changed.sum() > 5
