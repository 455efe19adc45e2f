"""Points in pairs of frames: exact ones, those of Lucas-Kanade, and pairs that have none."""

import cv2
import numpy as np
import pytest
import torch

from data_prep.annotators.rendered import ExactTracks
from data_prep.annotators.tracks import LucasKanade, TrackerTracks
from data_prep.records import GroupLabel, Skip, SourceGroup
from data_prep.sources.marionette import MarionettePairs


def texture(side=64, seed=0):
    """A smooth random image (side, side, 3) uint8."""
    noise = np.random.default_rng(seed).integers(256, size=(side, side, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 1.5)
    return ((smooth - smooth.min()) / np.ptp(smooth) * 255).astype(np.uint8)


def moving(count, step, side=64):
    """A video (count, 3, side, side) of a texture that moves by `step` (x, y) from frame to frame."""
    base = texture(side)
    frames = [
        cv2.warpAffine(
            base, np.float32([[1, 0, step[0] * i], [0, 1, step[1] * i]]), (side, side), flags=cv2.INTER_CUBIC
        )
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def group(images, **known):
    return SourceGroup("clip 3", images, "", "video", **known)


def test_a_known_motion_is_followed_from_any_frame():
    video = moving(5, (1.5, -0.75))
    queries = torch.tensor([[0, 20.0, 30.0], [0, 40.5, 40.0], [2, 30.0, 25.25], [4, 30.0, 20.0]])
    tracks, visible = LucasKanade().track(video, queries)
    assert tracks.shape == (5, 4, 2) and tracks.dtype == torch.float32 and visible.all()
    steps = torch.arange(5.0)[:, None] - queries[:, 0]
    expected = queries[:, 1:] + steps[..., None] * torch.tensor([1.5, -0.75])
    assert (tracks - expected).norm(dim=-1).max() < 0.15


def test_a_point_that_leaves_the_image_is_lost_for_good():
    video = torch.cat([moving(4, (6.0, 0.0)), moving(4, (6.0, 0.0)).flip(0)])
    _, visible = LucasKanade().track(video, torch.tensor([[0, 55.0, 30.0], [0, 20.0, 30.0]]))
    assert visible[:, 1].all()
    assert visible[0, 0] and not visible[2:, 0].any()


def test_a_point_that_is_covered_is_lost():
    video = moving(4, (0.5, 0.5))
    video[2:, :, 20:44, 20:44] = torch.from_numpy(texture(24, seed=1)).permute(2, 0, 1)
    _, visible = LucasKanade().track(video, torch.tensor([[0, 31.0, 31.0], [0, 10.0, 50.0]]))
    assert visible[:, 1].all() and visible[:2, 0].all() and not visible[2:, 0].any()


def test_lucas_kanade_agrees_with_the_exact_tracks_of_a_rendered_video():
    source = MarionettePairs(kinds={"portrait": 1.0}, clips=True, points=200)
    errors = []
    for clip in source.read("val", range(4)):
        queries = torch.cat([torch.zeros(len(clip.points), 1), clip.points[:, 0, :2]], 1)
        tracks, visible = LucasKanade().track(clip.images, queries)
        both = (clip.points[..., 2] > 0).all(1) & visible[-1]
        errors.append((tracks[-1] - clip.points[:, 1, :2]).norm(dim=-1)[both])
    errors = torch.cat(errors)
    assert len(errors) > 80 and errors.median() < 1.5


def test_the_grid_starts_on_the_mask():
    video, mask = moving(3, (1.0, 0.0)), torch.zeros(64, 64, dtype=torch.bool)
    mask[16:48, 8:24] = True
    (label,) = TrackerTracks(tracker=LucasKanade(), grid=16).annotate([group(video, mask=mask)])
    assert isinstance(label, GroupLabel) and torch.equal(label.images, video[[0, 2]])
    starts = label.points[:, 0, :2]
    assert len(starts) == 32 and starts.min(0).values.tolist() == [9.5, 17.5]
    seen = label.points[..., 2].all(1)
    assert seen.sum() > 24
    moved = (label.points[:, 1] - label.points[:, 0])[seen, :2]
    assert (moved - torch.tensor([2.0, 0.0])).norm(dim=-1).max() < 0.3
    (label,) = TrackerTracks(tracker=LucasKanade(), grid=16).annotate([group(video)])
    assert len(label.points) == 256


def test_exact_points_are_taken_as_they_are():
    points = torch.rand(9, 2, 3).ceil()
    (label,) = ExactTracks(min_points=9).annotate([group(moving(3, (1, 0)), points=points)])
    assert torch.equal(label.points, points) and len(label.images) == 2


@pytest.mark.parametrize(("seen", "min_points"), [(7, 8), (0, 0), (0, 1)])
def test_pairs_with_too_few_shared_points_are_skipped_by_name(seen, min_points):
    points = torch.ones(20, 2, 3)
    points[seen:, 1, 2] = 0
    (skip,) = ExactTracks(min_points=min_points).annotate([group(moving(2, (1, 0)), points=points)])
    assert skip == Skip(f"clip 3: expected {max(min_points, 1)} points visible in both frames, found {seen}")


def test_videos_that_cannot_be_followed_are_skipped_by_name():
    tracks = TrackerTracks(tracker=LucasKanade(), grid=8)
    empty = group(moving(2, (1, 0)), mask=torch.zeros(64, 64, dtype=torch.bool))
    unlike = group(torch.from_numpy(np.stack([texture(), texture(seed=1)])).permute(0, 3, 1, 2))
    first, second = tracks.annotate([empty, unlike])
    assert first == Skip("clip 3: expected points on a thing in the first frame, its mask has none")
    assert isinstance(second, Skip) or second.points[..., 2].all(1).float().mean() < 0.4
