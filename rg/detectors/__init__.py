"""Who judges images; knows no head."""

from rg.detectors.attributes import AttributeClassifier
from rg.detectors.detection import Detection, Detector
from rg.detectors.keypoints import KeypointDetector
from rg.detectors.transformer import PoseTransformer

__all__ = ["AttributeClassifier", "Detection", "Detector", "KeypointDetector", "PoseTransformer"]
