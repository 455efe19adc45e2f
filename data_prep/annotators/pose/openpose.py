"""People by OpenPose: the network's heatmaps and part affinity fields, put together to bodies (Cao et al., 2017)."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, generate_binary_structure, maximum_filter
from torch import Tensor
from torch.nn import functional

from data_prep.annotators.networks import find_file, in_batches, load_weights, place
from data_prep.annotators.pose.openpose_network import FIELDS, STRIDE, OpenPoseNetwork
from data_prep.annotators.pose.people import KEY, PoseAnnotator, instead_of
from rg.points import KEYPOINTS, LIMBS, rescale

# The limbs that are drawn, and two from a shoulder to an ear that only join what is found; of each the field of x.
JOINED = (*LIMBS, (2, 16), (5, 17))
FIELD_OF = (12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26)
PEAK, ALONG = 0.1, 0.05  # the least height of a keypoint, and of a field along a limb
SIGMA = 3.0  # of the heatmaps' smoothing, in pixels of what the network sees
STEPS, AGREEING = 10, 0.8  # places along a limb at which its field is read, and the share that must exceed ALONG
MIN_PARTS, MIN_SCORE = 4, 0.4  # of a person: keypoints, and the mean score of each


class OpenPose(PoseAnnotator):
    """OpenPose's 18 keypoints of any number of people.

    Args:
        weights: a file with the names of body_pose_model.pth; None takes the hub's.
        repo, revision: where the hub has that file, and the commit.
        side: of the square that the network sees, in pixels, a multiple of 8: people may be smaller in a larger one.
        batch_size: images at once on a GPU.
        line_width, keep_empty: see PoseAnnotator.
        key: the setting that names this annotator, for messages.

    Raises:
        FileNotFoundError, ValueError: see find_file and load_weights; a side that is no multiple of 8.
    """

    def __init__(
        self,
        *,
        weights: str | None = None,
        repo: str = "lllyasviel/Annotators",
        revision: str,
        side: int = 368,
        batch_size: int = 8,
        line_width: float = 2.0,
        keep_empty: bool = False,
        key: str = KEY,
    ) -> None:
        super().__init__(line_width=line_width, keep_empty=keep_empty)
        if side < STRIDE or side % STRIDE:
            raise ValueError(f"{key}.side: expected a multiple of {STRIDE}, got {side}")
        home = {"repo": repo, "file": "body_pose_model.pth", "revision": revision}
        file = find_file(f"{key}.weights", weights, **home, instead=instead_of(key))
        network = load_weights(OpenPoseNetwork, file)
        self.network, self.side, self.batch_size = place(network), side, batch_size

    def find(self, images: Tensor) -> list[Tensor]:
        """See PoseAnnotator."""
        maps = in_batches(self._read, images, next(self.network.parameters()), self.batch_size)
        people = (find_people(fields, (self.side, self.side)) for fields in maps)
        size, seen = images.shape[-2:], (self.side, self.side)
        return [torch.cat([rescale(found[..., :2], seen, size), found[..., 2:]], -1) for found in people]

    def _read(self, images: Tensor) -> Tensor:
        size = (self.side, self.side)
        small = functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return self.network(small.flip(1) / 256 - 0.5)


@dataclass
class Body:
    """A person under way: the candidate that is each keypoint, or -1, and the sum of what speaks for it."""

    parts: np.ndarray
    score: float

    @property
    def count(self) -> int:
        return int((self.parts >= 0).sum())


def find_people(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """The people in an image of `size`, by the network's maps (57, h, w): (P, 18, 3) of (x, y, visible) in pixels."""
    resized = functional.interpolate(maps[None], size, mode="bicubic", align_corners=False)[0].numpy()
    fields, heatmaps = resized[:FIELDS], resized[FIELDS : FIELDS + len(KEYPOINTS)]
    candidates = [find_peaks(heatmap) for heatmap in heatmaps]
    offsets = np.cumsum([0, *(len(found) for found in candidates)])
    places = np.concatenate(candidates)
    bodies: list[Body] = []
    for (start, end), field in zip(JOINED, FIELD_OF, strict=True):
        for a, b, score in match(candidates[start], candidates[end], fields[field : field + 2], size[0]):
            _join(bodies, (start, end), (offsets[start] + a, offsets[end] + b), score, places[:, 2])
    people = [body for body in bodies if body.count >= MIN_PARTS and body.score / body.count >= MIN_SCORE]
    keypoints = np.zeros((len(people), len(KEYPOINTS), 3), np.float32)
    for row, body in enumerate(people):
        found = body.parts >= 0
        keypoints[row, found, :2], keypoints[row, found, 2] = places[body.parts[found], :2], 1
    return torch.from_numpy(keypoints)


def find_peaks(heatmap: np.ndarray) -> np.ndarray:
    """The maxima of a heatmap (h, w): (N, 3) of (x, y, height), refined by a parabola through the neighbours."""
    smooth = gaussian_filter(heatmap, SIGMA)
    cross = generate_binary_structure(2, 1)
    rows, columns = np.nonzero((smooth == maximum_filter(smooth, footprint=cross, mode="constant")) & (smooth > PEAK))
    refined = []
    padded = np.pad(smooth, 1, mode="edge")
    for axis, cell in ((0, columns), (1, rows)):
        step = (1, 0) if axis else (0, 1)
        low, high = (padded[rows + 1 + sign * step[0], columns + 1 + sign * step[1]] for sign in (-1, 1))
        bend = 2 * smooth[rows, columns] - low - high
        refined.append(cell + np.where(bend > 1e-9, 0.5 * (high - low) / np.maximum(bend, 1e-9), 0).clip(-0.5, 0.5))
    return np.stack([*refined, heatmap[rows, columns]], -1).astype(np.float32)


def match(starts: np.ndarray, ends: np.ndarray, field: np.ndarray, height: int) -> list[tuple[int, int, float]]:
    """Pairs of candidates (N, 3) and (M, 3) that the field (2, h, w) of a limb joins, each in one pair at most.

    The score of a pair is the mean of the field along its direction (eq. 10), less where it is longer than half the
    image. The best pairs are taken first.
    """
    if not len(starts) or not len(ends):
        return []
    along = ends[None, :, :2] - starts[:, None, :2]
    length = np.maximum(np.linalg.norm(along, axis=-1), 1e-3)
    shares = np.linspace(0, 1, STEPS)[:, None]
    places = np.rint(starts[:, None, None, :2] + shares * along[:, :, None]).astype(int)
    columns = places[..., 0].clip(0, field.shape[2] - 1)
    rows = places[..., 1].clip(0, field.shape[1] - 1)
    values = (field[:, rows, columns] * np.moveaxis(along / length[..., None], -1, 0)[..., None]).sum(0)
    score = values.mean(-1) + np.minimum(0.5 * height / length - 1, 0)
    fits = ((values > ALONG).sum(-1) > AGREEING * STEPS) & (score > 0)
    pairs: list[tuple[int, int, float]] = []
    for flat in np.argsort(-score, axis=None, kind="stable"):
        a, b = divmod(int(flat), len(ends))
        if fits[a, b] and all(a != pair[0] and b != pair[1] for pair in pairs):
            pairs.append((a, b, float(score[a, b])))
    return pairs


def _join(bodies: list[Body], limb: tuple[int, int], ends: tuple[int, int], score: float, heights: np.ndarray) -> None:
    """Adds a limb to the body that has one of its ends, or joins the two that have one each, or begins another."""
    owners = [body for body in bodies if any(body.parts[part] == end for part, end in zip(limb, ends, strict=True))]
    if not owners:
        if limb in LIMBS:
            parts = np.full(len(KEYPOINTS), -1)
            parts[list(limb)] = ends
            bodies.append(Body(parts, float(heights[list(ends)].sum()) + score))
        return
    first = owners[0]
    if len(owners) > 1 and not ((first.parts >= 0) & (owners[1].parts >= 0)).any():
        first.parts = np.maximum(first.parts, owners[1].parts)
        first.score += owners[1].score + score
        bodies[:] = [body for body in bodies if body is not owners[1]]
        return
    for part, end in zip(limb, ends, strict=True):
        if first.parts[part] < 0:
            first.parts[part] = end
            first.score += float(heights[end]) + score
