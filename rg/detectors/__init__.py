"""Who judges images; knows no head."""

from rg.detectors.attributes import AttributeClassifier
from rg.detectors.keypoints import KeypointDetector

__all__ = ["AttributeClassifier", "KeypointDetector"]
