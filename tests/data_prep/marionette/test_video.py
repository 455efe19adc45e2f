"""Videos: smooth motion of one scene, and tracks that stay on the surfaces that the images show."""

import math
from dataclasses import fields
from typing import Any

import pytest
import torch

from data_prep.marionette.body_parts import PARTS
from data_prep.marionette.render import Stills, render_scenes
from data_prep.marionette.scene import KINDS
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.stage import set_stage
from data_prep.marionette.video import BEAT, Clip, _follow, draw_video, render_clip
from rg.points import inside


def clip_of(seed: tuple[int, ...], frames: int, kinds: dict[str, float] = KINDS, **settings: Any) -> Clip:
    """The first frames of the video of a seed, with 64 points."""
    return render_clip(draw_video(seed, frames, kinds), **{"seed": seed, "points": 64} | settings)


@pytest.fixture(scope="module")
def clips():
    """Three clips of 12 frames, one of each kind of scene."""
    return [clip_of((1, 0), 12, {kind: 1.0}) for kind in ("one", "two", "portrait")]


def test_the_first_frame_is_the_scene_of_the_seed_and_the_rest_is_the_same_world():
    for index in range(6):
        scenes, first = draw_video((2, index), 20), draw_scene((2, index))
        assert scenes[0] == first
        for one in scenes:
            assert (one.things, one.light, one.sky, one.phase) == (first.things, first.light, first.sky, first.phase)
            for now, then in zip(one.people, first.people, strict=True):
                assert now.identity == then.identity and now.phase == then.phase


def test_a_longer_video_goes_on_where_a_shorter_one_ends():
    assert draw_video((2, 0), BEAT)[: BEAT - 2] == draw_video((2, 0), BEAT - 2)
    assert draw_video((2, 0), BEAT - 2) != draw_video((2, 1), BEAT - 2)


def test_motion_is_smooth_and_moves():
    """No joint jumps, also where one pose has been reached and the next one begins, and nobody spins around."""
    for index in range(8):
        scenes = draw_video((3, index), 3 * BEAT + 1)
        joints = set_stage(scenes).world.start  # every part's start in the world
        there = set_stage(scenes[:1]).world.radius[0] > 0
        speed = joints[:, :, there].diff(dim=1).norm(dim=0)
        assert 0.05 < speed.max() < 0.3 and speed.diff(dim=0).abs().max() < 0.06
        cameras = torch.tensor([[one.camera.yaw, one.camera.distance] for one in scenes])
        assert (cameras.diff(dim=0).abs().amax(0) > 0).all() and cameras.diff(dim=0).abs().amax() < 0.08
        yaws = torch.tensor([[someone.pose["yaw"] for someone in one.people] for one in scenes])
        assert yaws[::BEAT].diff(dim=0).abs().max() <= math.pi + 1e-6


def test_shapes_and_errors(scene, person):
    made = clip_of((1, 1), 3, points=5, resolution=16, supersampling=1)
    assert made.stills.image.shape == (3, 3, 16, 16)
    assert (made.tracks.shape, made.tracks.dtype) == ((3, 5, 2), torch.float32)
    assert (made.visible.shape, made.visible.dtype) == ((3, 5), torch.bool)
    assert (made.instances.shape, made.instances.dtype) == ((5,), torch.uint8) and (made.instances > 0).all()
    with pytest.raises(ValueError, match=r"2 frames.*\(7, 8\)"):
        render_clip([scene(person(place=(30.0, 0.0)))] * 2, seed=(7, 8), points=5)


def test_a_seed_gives_the_same_bits_and_the_images_of_its_scenes():
    scenes = draw_video((4, 0), 4)
    one, again, other = (render_clip(scenes, seed=seed, points=64, resolution=32) for seed in ((4, 0), (4, 0), (4, 1)))
    stills = render_scenes(scenes, resolution=32, supersampling=2)
    for field in fields(Clip)[1:]:
        assert torch.equal(getattr(one, field.name), getattr(again, field.name)), field.name
    for field in fields(Stills):
        own, expected = getattr(one.stills, field.name), getattr(stills, field.name)
        assert torch.equal(own, expected) if isinstance(own, torch.Tensor) else own == expected, field.name
    assert not torch.equal(one.tracks, other.tracks)  # the seed draws the points


def test_every_track_is_seen_somewhere_and_visible_ones_lie_on_their_person(clips):
    for made in clips:
        assert made.visible.any(0).all()
        assert inside(made.tracks, (64, 64))[made.visible].all()
        right = total = 0
        for frame in range(len(made.tracks)):
            x, y = made.tracks[frame][made.visible[frame]].round().long().clamp(0, 63).unbind(-1)
            right += int((made.stills.instances[frame, y, x] == made.instances[made.visible[frame]]).sum())
            total += len(x)
        assert total > 300 and right > 0.93 * total  # at an outline a pixel may belong to its neighbour


def test_tracks_stay_on_their_part_and_their_paint():
    """Seen at 400 pixels, from frame to frame."""
    made = clip_of((5, 3), 6, {"one": 1.0}, points=200, resolution=400, supersampling=1)
    x, y = made.tracks.round().long().clamp(0, 399).unbind(-1)
    frame = torch.arange(6)[:, None].expand_as(x)
    parts, colors = made.stills.parts[frame, y, x], made.stills.image.movedim(1, -1)[frame, y, x].float()
    both = made.visible[:-1] & made.visible[1:]
    assert both.sum() > 500
    assert (parts[:-1] == parts[1:])[both].float().mean() > 0.97
    hue = colors / colors.sum(-1, keepdim=True).clamp_min(1)
    assert (hue[:-1] - hue[1:]).abs().amax(-1)[both].median() < 0.01
    assert made.tracks.diff(dim=0).norm(dim=-1).median() > 1


def test_a_point_on_the_chest_by_hand(scene, person):
    """Before a camera at (0, 0.9, 3), turned away, behind another person, and to the side of the image."""
    stage = set_stage(
        [
            scene(person(), person(place=(3.0, 0.0)), kind="two"),
            scene(person(yaw=math.pi), person(place=(3.0, 0.0)), kind="two"),
            scene(person(), person(place=(0.0, 1.0)), kind="two"),
            scene(person(place=(1.2, 0.0)), person(place=(3.0, 0.0)), kind="two"),
        ]
    )
    trunk = next(i for i, part in enumerate(PARTS) if (part.start, part.end) == ("pelvis", "neck"))
    chest = torch.tensor([[0.0], [0.3], [0.145]], dtype=torch.float64)
    pixels, visible = _follow(stage, torch.tensor([trunk]), chest, 64)
    near, far = 3 / (3 - 0.145), 3 / (3 + 0.145)
    height = 0.06 + 0.82 + 0.3 - 0.9
    expected = [(0, height * near), (0, height * far), (0, height * near), (1.2 * near, height * near)]
    expected = torch.tensor([[(1 + u) * 32 - 0.5, (1 - v) * 32 - 0.5] for u, v in expected])
    torch.testing.assert_close(pixels[:, 0], expected, atol=1e-4, rtol=0)
    assert visible[:, 0].tolist() == [True, False, False, False]


def test_points_are_followed_while_they_are_hidden(clips):
    hidden = ~clips[0].visible & inside(clips[0].tracks, (64, 64))
    assert 20 < hidden.sum() < 0.8 * hidden.numel()
    steps = clips[0].tracks.diff(dim=0).norm(dim=-1)
    assert steps.max() < 8 and (steps > 0).all()
