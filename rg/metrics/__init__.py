"""How readouts and images are measured."""

from rg.metrics.keypoints import PCK, match_people, oks, pck
from rg.metrics.maps import DepthScores, EdgeScores
from rg.metrics.statistics import cmmd, kernel_distance, paired_gain

__all__ = ["PCK", "DepthScores", "EdgeScores", "cmmd", "kernel_distance", "match_people", "oks", "paired_gain", "pck"]
