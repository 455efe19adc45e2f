"""How readouts and images are measured."""

from rg.metrics.keypoints import PCK, match_people, pck
from rg.metrics.maps import DepthScores, EdgeScores
from rg.metrics.statistics import kernel_distance, paired_gain

__all__ = ["PCK", "DepthScores", "EdgeScores", "kernel_distance", "match_people", "paired_gain", "pck"]
