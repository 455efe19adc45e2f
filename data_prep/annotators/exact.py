"""Labels that a renderer knows exactly."""

from collections.abc import Sequence

from torch.nn.utils.rnn import pad_sequence

from data_prep.annotators import Label
from data_prep.sources import Skip, SourceSample
from rg.points import draw_skeletons


class ExactPose:
    """Draws the OpenPose skeletons of generated pictures.

    Args:
        line_width: thickness of a limb in pixels of the picture.
    """

    def __init__(self, *, line_width: float = 2.0) -> None:
        self.line_width = line_width

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        people = pad_sequence([sample.keypoints for sample in samples], batch_first=True)
        size = samples[0].image.shape[1:]
        drawings = (draw_skeletons(people, size, size, self.line_width) * 255).round().byte()
        return [Label(drawing, sample.keypoints) for drawing, sample in zip(drawings, samples, strict=True)]
