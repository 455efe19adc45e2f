"""Paints and textures by hand and in images, light, and shadows by brute force."""

import math
from dataclasses import replace

import pytest
import torch

from data_prep.marionette.body_parts import OWN_LIMBS, PARTS, palette
from data_prep.marionette.materials import (
    CLOTH_CONTRAST,
    SHADOWLESS,
    TEXTURES,
    Material,
    Paint,
    backdrop,
    cast_shadows,
    light_directions,
    paint_part,
    pattern,
    shade,
)
from data_prep.marionette.raycast import directions, to_pixels
from data_prep.marionette.scene import FOCAL, Camera, Thing
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.skeleton import place_on_ground
from data_prep.marionette.stage import CAPSULE_INSTANCE, set_stage
from data_prep.marionette.vocabulary import COLORS, GROUNDS, SKIES

PLAIN, STRIPES, CHECKS, PATCHES = range(len(TEXTURES))
CAPSULES = len(CAPSULE_INSTANCE)  # of a scene


def values(texture, *points):
    return pattern(torch.full((len(points),), texture), torch.tensor(points).T)


def test_patterns_by_hand():
    assert values(PLAIN, (0.3, 0.1, 0.2)).tolist() == [0]
    # A wave falls from 1 at whole numbers to -1 half way between; stripes follow y alone.
    assert values(STRIPES, (0.3, 0.0, 9.0), (7.0, 0.5, 0.1), (0.2, 0.25, 0.0)).tolist() == [1, -1, 0]
    # Checks change their sign across half a period of each axis.
    fields = (0.25, 0.0, 0.25), (0.75, 0.0, 0.25), (0.25, 0.5, 0.25), (0.25, 0.0, 0.75), (0.75, 0.5, 0.75)
    signs = values(CHECKS, *fields).tolist()
    assert signs[0] == -signs[1] == -signs[2] == -signs[3] == -signs[4] and abs(signs[0]) == 1


def test_patterns_stay_in_their_range_and_repeat(uniform):
    points = 5 * uniform(3, 4000)
    found = torch.stack([pattern(torch.full((4000,), texture), points) for texture in range(len(TEXTURES))])
    assert found.abs().max() <= 1 and (found[1:].amin(1) < -0.9).all() and (found[1:].amax(1) > 0.9).all()
    assert found.mean(1).abs().max() < 0.1  # a texture leaves the average colour alone
    shifted = torch.stack([pattern(torch.full((4000,), texture), points + 1) for texture in (STRIPES, CHECKS)])
    torch.testing.assert_close(shifted, found[[STRIPES, CHECKS]], atol=1e-9, rtol=0)


def test_patches_are_smooth_and_are_no_stripes(uniform):
    points = 3 * uniform(3, 2000, seed=1)
    near = pattern(torch.full((2000,), PATCHES), points + 0.01 * uniform(3, 2000, seed=2))
    assert (near - pattern(torch.full((2000,), PATCHES), points)).abs().max() < 0.15
    for axis in range(3):
        step = torch.zeros(3, 1).double()
        step[axis] = 0.5
        assert (pattern(torch.full((2000,), PATCHES), points + step) - near).abs().mean() > 0.2


def test_paint_by_hand():
    materials = [
        [Material((100, 200, 0), "stripes", 2.0, 0.5, 0.25), Material((7, 8, 9))],
        [Material((10, 20, 30))] * 2,
    ]
    paint = Paint.stack(materials)
    points = torch.zeros(3, 2, 2)
    points[1, 0, 0] = 0.375  # 2 * 0.375 + 0.25 = a whole number: the lightest place
    colors = paint.color_at(points)
    assert colors[:, 0, 0].tolist() == [100 + 0.5 * (50 + 50), 200 + 0.5 * (50 + 100), 25]
    assert colors[:, 0, 1].tolist() == [7, 8, 9] and colors[:, 1].T.tolist() == [[10, 20, 30]] * 2
    where = torch.tensor([0, 1, 3, 0])
    assert torch.equal(paint.color_at(points.flatten(1)[:, where], where), colors.flatten(1)[:, where])


def test_people_are_painted_with_their_clothes_and_patterns(person):
    someone = replace(person(worn={"shirt_pattern": "checks"}), phase=0.4)
    colors = palette(someone.identity)
    worn = {part.paint: paint_part(part, colors, someone) for part in PARTS}
    assert worn["shirt"].texture == "checks" and worn["trousers"].texture == "plain"
    assert worn["shirt"].color == colors["shirt"] and worn["shirt"].phase == 0.4
    assert 0 < worn["skin"].contrast < worn["shirt"].contrast and 0 < worn["hair"].contrast < CLOTH_CONTRAST
    assert worn["hat"].color == (0, 0, 0)


def test_a_sleeve_of_its_own_colour_reaches_to_the_wrist_and_has_the_pattern_of_the_shirt(person):
    someone = person(worn={"shirt_pattern": "checks", "left_sleeve": "green", "left_leg": "white"})
    colors = palette(someone.identity)
    materials = {part.label: paint_part(part, colors, someone) for part in PARTS}
    for part in ("upper_arm", "forearm"):
        assert (materials[f"left_{part}"].color, materials[f"left_{part}"].texture) == (COLORS["green"], "checks")
    for part in ("thigh", "shin"):
        assert (materials[f"left_{part}"].color, materials[f"left_{part}"].texture) == (COLORS["white"], "plain")
    others = {label: material for label, material in materials.items() if label not in OWN_LIMBS or "right" in label}
    plain = person(worn={"shirt_pattern": "checks"})
    assert others == {part.label: paint_part(part, colors, plain) for part in PARTS if part.label in others}


def test_light_by_hand(scene):
    quarter = math.pi / 2
    found = light_directions([scene(light=light) for light in ((1.0, quarter), (0.0, 0.0), (quarter, 0.0), (0.5, 0.8))])
    torch.testing.assert_close(found[:, :3].T, torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]).double())
    torch.testing.assert_close(found.norm(dim=0), torch.ones(4).double())


def test_what_faces_the_light_is_brighter_and_what_turns_away_is_not_black():
    normals = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 1, 0], [-1, 0, 0]]).T
    found = shade(normals, torch.tensor([1.0, 0, 0])[:, None])
    assert found[0] > found[1] > found[2] == found[3] > 0.3


@pytest.fixture(scope="session")
def placed(body):
    """Ends (3,) and frame (3,3) in the world of every part of a person: `placed(person())`."""

    def place(someone):
        points, frames = body(someone)
        points = place_on_ground(points, torch.tensor(someone.place, dtype=torch.float64))
        return [(points[part.start], points[part.end], torch.stack(frames[part.frame])) for part in PARTS]

    return place


def spread_over(axis, radius, places):
    """Points (3,N) on the round wall of a part and their outward normals, in the part's own axes.

    Args:
        axis: (3,) from its start to its end. places: (2,N) between -1 and 1, along the axis and around it.
    """
    share, angle = (places[0] + 1) / 2, math.pi * places[1]
    first = torch.linalg.cross(axis, axis.roll(1) + 1)
    first, second = (side / side.norm() for side in (first, torch.linalg.cross(axis, first)))
    normal = angle.cos() * first[:, None] + angle.sin() * second[:, None]
    return share * axis[:, None] + radius * normal, normal


def read_part(one, start, frame, points, normals, shoot, resolution=320):
    """The unlit colours (3,N) that an image shows of points of a part, and which of them it shows."""
    stage = set_stage([one])
    world, facing = start[:, None] + frame.T @ points, frame.T @ normals
    still = shoot(one, resolution=resolution, supersampling=1)
    seen = stage.views.to_camera(world[:, None])[:, 0]
    column, row = to_pixels(seen, resolution).round().long().unbind(-1)
    within = (column >= 0) & (row >= 0) & (column < resolution) & (row < resolution)
    column, row = column.clamp(0, resolution - 1), row.clamp(0, resolution - 1)
    shown = within & ((1 / still.depth[0, row, column] + seen[2]).abs() < 0.01)
    shown &= (facing * (stage.views.position - world)).sum(0) > 0.3 * (stage.views.position - world).norm(dim=0)
    lit = shade(facing, light_directions([one])) * SKIES[one.sky].brightness
    return still.image[0, :, row, column] / lit, shown


@pytest.mark.parametrize(
    ("name", "texture"),
    [
        ("trunk", "stripes"),
        ("trunk", "checks"),
        ("left_upper_arm", "patches"),
        ("left_upper_arm", "checks"),
        ("right_shin", "stripes"),
    ],
)
def test_textures_stick_to_the_part_when_pose_and_camera_change(scene, person, shoot, placed, uniform, name, texture):
    """Places on a part keep their colour from one image to another of the same person in another pose."""
    part = next(i for i, part in enumerate(PARTS) if part.label == name)
    worn = {f"{garment}_pattern": texture for garment in ("shirt", "trousers")} | {"girth": 1.1}
    worn |= {"shirt": "green", "trousers": "orange"}
    bent = {"yaw": 0.5, "left_arm_spread": 1.4, "left_elbow": 1.0, "right_leg_swing": -0.8, "right_knee": 0.9}
    before = scene(replace(person(worn=worn), phase=0.3))
    after = scene(
        replace(person(worn=worn, place=(0.1, -0.2), lean_roll=0.15, **bent), phase=0.3),
        camera=Camera(0.3, 0.1, 2.7),
        light=(1.0, 0.7),
        sky="dusk",
    )
    start, end, frame = placed(before.people[0])[part]
    radius = PARTS[part].radius * before.people[0].identity[PARTS[part].girth]
    points, normals = spread_over(frame @ (end - start), radius, uniform(2, 400))
    first, in_first = read_part(before, start, frame, points, normals, shoot)
    start, _, frame = placed(after.people[0])[part]
    second, in_second = read_part(after, start, frame, points, normals, shoot)
    both = in_first & in_second
    assert both.sum() > 60
    first, second = first[:, both], second[:, both]
    error = (first - second).abs().amax(0)
    assert error.median() < 4 and error.quantile(0.8) < 14  # half a pixel beside the place
    assert (first - second.roll(1, -1)).abs().amax(0).mean() > 15  # and places differ from each other


def test_every_pixel_of_clothes_is_its_paint_in_the_parts_axes(shoot, placed):
    """Images of drawn scenes against paint looked up at the points that the depth map puts on the body."""
    resolution, checked = 80, 0
    for index in range(5):
        one = draw_scene((12, 0, index), {"one": 1.0})
        stage, still = set_stage([one]), shoot(one, resolution=resolution, supersampling=1)
        ray = directions(torch.arange(resolution**2), resolution, FOCAL).double()
        point = ray / still.depth[0].flatten().clamp_min(1e-6)
        world = stage.views.position + (stage.views.axes[..., 0].T @ point)
        lowest = torch.full((resolution**2,), torch.inf, dtype=torch.float64)
        expected, colors = torch.zeros(3, resolution**2, dtype=torch.float64), palette(one.people[0].identity)
        for part, (start, end, frame) in zip(PARTS, placed(one.people[0]), strict=True):
            if part.paint not in colors:
                continue
            axis, offset = (end - start)[:, None], world - start[:, None]
            share = ((offset * axis).sum(0) / (axis * axis).sum().clamp_min(1e-12)).clamp(0, 1)
            away = offset - share * axis
            gap = (away.norm(dim=0) - part.radius * one.people[0].identity[part.girth]).abs()
            material = paint_part(part, colors, one.people[0])
            paint = Paint.stack([[material]]).color_at(frame @ offset, torch.zeros(resolution**2, dtype=torch.int64))
            light = shade(away / away.norm(dim=0), light_directions([one])) * SKIES[one.sky].brightness
            expected = torch.where(gap < lowest, (paint * light).clamp(0, 255), expected)
            lowest = torch.minimum(gap, lowest)
        own = (still.instances[0] == 1).flatten() & (lowest < 1e-4)
        error = (still.image[0].flatten(1)[:, own] - expected[:, own]).abs().amax(0)
        assert error.quantile(0.97) < 1.5, index  # where two parts meet, either may be the nearer by a hair
        checked += int(own.sum())
    assert checked > 1500


def test_a_turn_about_a_parts_own_axis_turns_its_pattern(scene, person):
    """Whoever looks aside moves neither neck nor crown, but the pattern around the neck goes along."""
    stage = set_stage([scene(person(head_yaw=yaw)) for yaw in (0.0, 0.5)])
    neck = next(i for i, part in enumerate(PARTS) if (part.start, part.end) == ("neck", "head"))
    assert torch.equal(stage.seen.start[:, 0, neck], stage.seen.start[:, 1, neck])
    assert torch.equal(stage.seen.end[:, 0, neck], stage.seen.end[:, 1, neck])
    angle = torch.linspace(0, 2 * math.pi, 200).double()
    offset = 0.05 * torch.stack([angle.sin(), torch.linspace(0, 3, 200).double(), angle.cos()])
    cosine, sine = math.cos(0.5), math.sin(0.5)
    turned = torch.stack([cosine * offset[0] + sine * offset[2], offset[1], cosine * offset[2] - sine * offset[0]])
    still, moved, followed = (
        stage.paint.color_at(stage.frames[:, :, b, neck] @ places, torch.full((200,), b * CAPSULES + neck))
        for b, places in ((0, offset), (1, offset), (1, turned))
    )
    torch.testing.assert_close(followed, still)
    assert (moved - still).abs().amax(0).mean() > 1.5


def test_shadows_against_every_ray_and_every_capsule(distance):
    """A place on the ground is dark if the way to the light comes within the radius of something."""
    side, scenes = 24, [draw_scene((13, 0, index), {"one": 0.6, "two": 0.4}) for index in range(4)]
    stage, light = set_stage(scenes), light_directions(scenes)
    found = cast_shadows(stage.world, stage.views, light, side).view(len(scenes), -1)
    ray = directions(torch.arange(side * side), side, FOCAL).double()
    steps = torch.linspace(0, 4, 81)[:, None, None]  # 0.05 long
    dark = 0
    for b in range(len(scenes)):
        downwards = stage.views.axes[..., b].T @ ray
        assert not found[b, downwards[1] >= 0].any()
        below = (downwards[1] < -1e-3).nonzero().squeeze(1)
        ground = (
            stage.views.position[:, b, None] - downwards[:, below] * stage.views.position[1, b] / downwards[1, below]
        )
        path = ground.float()[:, None, :, None] + steps * light[:, b, None, None, None].float()
        there = (stage.world.radius[b] > SHADOWLESS).nonzero().squeeze(1)
        start, end = (ends[:, b, there][:, None, None].float() for ends in (stage.world.start, stage.world.end))
        away = distance(path, start, end, stage.world.radius[b, there].float())
        lowest = away.amin((0, 2))
        clear = (lowest.abs() > 0.015) & (away[0].amin(-1) > 0)  # inside of things no ground is seen
        assert torch.equal(found[b, below][clear], lowest[clear] < 0), b
        dark += int((lowest[clear] < 0).sum())
    assert dark > 30


def test_the_shadow_of_a_ball_lies_where_the_light_throws_it(scene):
    """The light comes from +x at 45 degrees: an ellipse on the other side, twice the square root of two as long."""
    ball = scene(things=(Thing("ball", 0.2, (0.0, 0.0)),), light=(math.pi / 2, math.pi / 4))
    stage, side = set_stage([ball]), 200
    dark = cast_shadows(stage.world, stage.views, light_directions([ball]), side)
    downwards = stage.views.axes[..., 0].T @ directions(dark.nonzero().squeeze(1), side, FOCAL).double()
    x, _, z = stage.views.position + downwards * stage.views.position[1] / -downwards[1]
    reach = 0.2 * math.sqrt(2)
    assert (x.min(), x.max(), z.min(), z.max()) == pytest.approx((-0.2 - reach, -0.2 + reach, -0.2, 0.2), abs=0.03)
    assert (((x + 0.2) / reach) ** 2 + (z / 0.2) ** 2 < 1.01).all()


def test_shadows_darken_the_ground_alone(scene, person):
    one = scene(person(), light=(-1.0, 0.6))
    stage, light = set_stage([one]), light_directions([one])
    shadows = cast_shadows(stage.world, stage.views, light, 64)
    bright, shaded = (backdrop([one], stage.views, where, 64) for where in (torch.zeros_like(shadows), shadows))
    assert 40 < shadows.sum() < 600
    kept = 1 - SKIES["day"].shadow
    torch.testing.assert_close(shaded.color[:, shadows], bright.color[:, shadows] * kept)
    assert torch.equal(shaded.color[:, ~shadows], bright.color[:, ~shadows])
    assert bright.ground[shadows].all()


def look_around(one, side=48):
    stage = set_stage([one])
    return backdrop([one], stage.views, torch.zeros(side * side, dtype=torch.bool), side)


def test_ground_and_sky_by_hand(scene):
    """A level camera at 0.9: the upper half is sky, a ray that falls f units per unit meets the ground at 0.9 / f."""
    seen = look_around(scene())
    fall = (2 * torch.arange(48) + 1) / 48 / FOCAL - 1 / FOCAL
    expected = torch.where(fall > 0, 0.9 / fall, torch.inf)
    torch.testing.assert_close(seen.depth.view(48, 48), expected[:, None].expand(48, 48), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen.ground.view(48, 48), (fall > 0)[:, None].expand(48, 48))
    nothing = look_around(scene(camera=Camera(shift=(0.0, 3.0), elevation=-0.6)))
    assert not nothing.ground.any() and torch.isinf(nothing.depth).all()


@pytest.mark.parametrize("ground", GROUNDS)
def test_the_texture_of_the_ground_stays_on_the_ground(scene, ground):
    """The world's origin, seen in one pixel from all around, has one colour that depends on where the texture is."""
    side, row = 65, 60
    height = (2 * row + 1) / side - 1
    colors = torch.tensor(
        [
            [look_around(scene(ground=ground, phase=phase, camera=Camera(yaw, 0, 3.0, (0.0, height))), side)
             .color.view(3, side, side)[:, row, 32].tolist() for yaw in (-2.0, 0.0, 0.9, 3.0)]
            for phase in (0.0, 0.2, 0.45, 0.7)
        ]
    )  # fmt: skip
    assert (colors - colors[:, :1]).abs().max() < 0.2
    assert colors[:, 0].std(0).max() > 1


def test_each_sky_and_ground_has_its_colours(scene):
    images = {
        (sky, ground): look_around(scene(sky=sky, ground=ground)).color.view(3, 48, 48)
        for sky in SKIES
        for ground in GROUNDS
    }
    for (sky, ground), image in images.items():
        near = image[:, -12:].mean((1, 2))
        expected = torch.tensor(GROUNDS[ground].color) * SKIES[sky].brightness
        assert (near - expected).abs().max() < 25, (sky, ground)
    brightness = {sky: images[sky, "grass"].mean().item() for sky in SKIES}
    assert brightness["night"] < brightness["dusk"] < brightness["day"]


def test_the_night_is_darker_on_people_too(scene, person, shoot):
    stills = shoot(scene(person()), scene(person(), sky="night"))
    own = (stills.instances[0] == 1) & (stills.parts[0] > 2)
    day, night = stills.image[:, :, own].float().mean((1, 2))
    assert night / day == pytest.approx(SKIES["night"].brightness / SKIES["day"].brightness, abs=0.05)


def test_small_parts_cast_no_shadow(scene, person):
    worn = {"glasses": True, "hat": "red"}
    stage = set_stage([scene(person(worn=worn))])
    thick = stage.world.radius[0, : len(PARTS)] > SHADOWLESS
    assert {part.paint for part, casts in zip(PARTS, thick, strict=True) if not casts} >= {"glasses", "iris", "mouth"}
    assert {part.paint for part, casts in zip(PARTS, thick, strict=True) if casts} >= {"shirt", "skin", "trousers"}
