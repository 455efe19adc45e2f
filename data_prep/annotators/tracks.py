"""Pairs of frames with the points that are the same in both: known to the renderer, or followed by a tracker."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from data_prep.records import GroupLabel, Skip, SourceGroup


class Tracker(Protocol):
    """Follows points through a video; the form is that of CoTracker (Karaev et al., 2023) for one video."""

    def track(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Tracks (T, N, 2) float32 of (x, y) in pixels, and whether each is visible, (T, N) bool.

        Args:
            video: (T, 3, H, W) uint8, RGB.
            queries: (N, 3) float32 of (frame, x, y): where each point is known to be.
        """
        ...


class LucasKanade:
    """Pyramidal Lucas-Kanade optical flow (Bouguet, 2000), frame by frame.

    A point is lost, and stays so, once it leaves the image, or once following it back by one frame misses where it
    came from (Kalal et al., 2010).

    Args:
        window: side of the patch that is matched, in pixels.
        levels: halvings of the image.
        max_error: largest distance between a point and where it comes back to, in pixels.
    """

    def __init__(self, *, window: int = 9, levels: int = 2, max_error: float = 0.5) -> None:
        self.flow = {"winSize": (window, window), "maxLevel": levels}
        self.max_error = max_error

    def track(self, video: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """See Tracker."""
        frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video.permute(0, 2, 3, 1).numpy()]
        starts, points = queries[:, 0].long().numpy(), queries[:, 1:].numpy()
        tracks = np.zeros((len(frames), len(points), 2), np.float32)
        visible = np.zeros((len(frames), len(points)), bool)
        for start in np.unique(starts):
            chosen = starts == start
            tracks[start, chosen], visible[start, chosen] = points[chosen], True
            for order in (range(start, len(frames)), range(start, -1, -1)):
                for now, then in pairwise(order):
                    moved, kept = self._step(frames[now], frames[then], tracks[now, chosen])
                    tracks[then, chosen], visible[then, chosen] = moved, kept & visible[now, chosen]
        return torch.from_numpy(tracks), torch.from_numpy(visible)

    def _step(self, now: np.ndarray, then: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points (N, 2) of one frame are in the next, and which of them are found there and back."""
        moved, kept, _ = cv2.calcOpticalFlowPyrLK(now, then, points[:, None], None, **self.flow)
        back, kept_back, _ = cv2.calcOpticalFlowPyrLK(then, now, moved, None, **self.flow)
        moved, back = moved[:, 0], back[:, 0]
        error = np.linalg.norm(back - points, axis=-1)
        inside = ((moved >= -0.5) & (moved < np.array(now.shape[::-1]) - 0.5)).all(-1)
        return moved, (kept[:, 0] > 0) & (kept_back[:, 0] > 0) & (error < self.max_error) & inside


class TrackerTracks:
    """Follows a grid of points on the things in the first frame to the last one.

    Args:
        tracker: a Tracker.
        grid: points along each side of the image, before those off the things are left out.
        min_points: that must be visible in both frames of a pair, at least 1.
    """

    def __init__(self, *, tracker: Tracker, grid: int = 20, min_points: int = 8) -> None:
        self.tracker, self.grid, self.min_points = tracker, grid, min_points

    def annotate(self, samples: Sequence[SourceGroup]) -> list[GroupLabel | Skip]:
        return [self._label(sample) for sample in samples]

    def _label(self, sample: SourceGroup) -> GroupLabel | Skip:
        side = sample.images.shape[-1]
        places = (torch.arange(self.grid) + 0.5) * side / self.grid - 0.5
        x, y = torch.meshgrid(places, places, indexing="xy")
        queries = torch.stack([torch.zeros_like(x), x, y], -1).flatten(0, 1)
        if sample.mask is not None:
            column, row = queries[:, 1:].round().long().clamp(0, side - 1).unbind(-1)
            queries = queries[sample.mask[row, column]]
        if not len(queries):
            return Skip(f"{sample.name}: expected points on a thing in the first frame, its mask has none")
        tracks, visible = self.tracker.track(sample.images, queries)
        points = torch.cat([tracks, visible[..., None]], -1)[[0, -1]].transpose(0, 1)
        return label_pair(sample, points, self.min_points)


def label_pair(sample: SourceGroup, points: Tensor, min_points: int) -> GroupLabel | Skip:
    """The pair with points (N, 2, 3), or why it has too few of them."""
    seen = int((points[..., 2] > 0).all(1).sum())
    if seen < max(min_points, 1):
        return Skip(f"{sample.name}: expected {max(min_points, 1)} points visible in both frames, found {seen}")
    return GroupLabel(sample.images[[0, -1]], points)
