"""Labels that a renderer knows exactly."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_prep.annotators.edges import LineAnnotator
from data_prep.annotators.tracks import label_pair
from data_prep.records import GroupLabel, Label, Skip, SourceGroup, SourceSample
from rg.points import draw_skeletons


class ExactPose:
    """Draws the OpenPose skeletons of generated images.

    Args:
        line_width: thickness of a limb in pixels of the image.
    """

    def __init__(self, *, line_width: float = 2.0) -> None:
        self.line_width = line_width

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        people = pad_sequence([_known(sample, "keypoints") for sample in samples], batch_first=True)
        size = samples[0].image.shape[1:]
        drawings = (draw_skeletons(people, size, size, self.line_width) * 255).round().byte()
        return [Label(drawing, sample.keypoints) for drawing, sample in zip(drawings, samples, strict=True)]


class ExactDepth:
    """Inverse depth of generated images as grey, divided by the largest in the image: white is its nearest point,
    black infinitely far.

    Where the sky is seen this is the usual scaling of MiDaS's inverse depth to its smallest and largest value; without
    it black keeps its meaning here, so that ratios of grey levels are ratios of depths in every image.
    An image of nothing but sky is skipped by name.
    """

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        return [self._label(sample, _known(sample, "depth")) for sample in samples]

    def _label(self, sample: SourceSample, depth: Tensor) -> Label | Skip:
        nearest = depth.max()
        if nearest <= 0:
            return Skip(f"{sample.name} has no label: nothing in it has a depth")
        grey = (depth / nearest * 255).round().byte()
        return Label(grey.expand(3, -1, -1), _known(sample, "keypoints"))


class ExactEdges(LineAnnotator):
    """Outlines of the parts of generated images and jumps in their depth; no pattern and no shadow is an edge."""

    def find(self, sample: SourceSample) -> Tensor:
        """Edges of one pixel's width: (H, W) bool."""
        return _known(sample, "edges")


def _known(sample: SourceSample, name: str) -> Tensor:
    value = getattr(sample, name)
    if value is None:
        raise ValueError(f"annotator: expected a source that renders its images, {sample.name} comes without {name}")
    return value


class ExactTracks:
    """Takes the points that a renderer followed.

    Args:
        min_points: that must be visible in both frames of a pair, at least 1.
    """

    def __init__(self, *, min_points: int = 8) -> None:
        self.min_points = min_points

    def annotate(self, samples: Sequence[SourceGroup]) -> list[GroupLabel | Skip]:
        return [label_pair(sample, sample.points, self.min_points) for sample in samples]
