"""People by BlazePose (Bazarevsky et al., 2020), of which the wheel of mediapipe 0.10.21 has the files."""

import math
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from data_prep.annotators.pose.people import KEY, PoseAnnotator, find_model, from_coco

DETECTOR, LANDMARKS = "pose_detection.tflite", "pose_landmark_full.tflite"
DETECTOR_SIDE, LANDMARK_SIDE = 224, 256
# Of the detector's anchors: cells along a side, and anchors in each cell.
ANCHORS = ((28, 2), (14, 2), (7, 6))
OVERLAP = 0.3  # of two boxes of one person
MARGIN = 1.25  # of the square that is read, around the circle of a person
COCO_OF = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)  # COCO's 17 of the 33 landmarks


class BlazePose(PoseAnnotator):
    """A detector of people, and for each a network of 33 landmarks, without a GPU; needs ai-edge-litert.

    Args:
        folder: with pose_detection.tflite and pose_landmark_full.tflite anywhere below it, see docs/data.md.
        least_person, least_keypoint: scores in [0, 1] below which a person is none, and a keypoint not seen.
        threads: of the interpreter.
        line_width, keep_empty: see PoseAnnotator.
        key: the setting that names this annotator, for messages.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: ai-edge-litert is not installed, or a file is damaged.
    """

    def __init__(
        self,
        *,
        folder: str,
        least_person: float = 0.5,
        least_keypoint: float = 0.5,
        threads: int = 1,
        line_width: float = 2.0,
        keep_empty: bool = False,
        key: str = KEY,
    ) -> None:
        super().__init__(line_width=line_width, keep_empty=keep_empty)
        self.least_person, self.least_keypoint = least_person, least_keypoint
        self.detector = _interpreter(key, folder, DETECTOR, threads)
        self.landmarks = _interpreter(key, folder, LANDMARKS, threads)
        self.anchors = np.concatenate([_anchors(side, count) for side, count in ANCHORS])

    def find(self, images: Tensor) -> list[Tensor]:
        """See PoseAnnotator."""
        return [self._find(image) for image in images.permute(0, 2, 3, 1).contiguous().numpy()]

    def _find(self, image: np.ndarray) -> Tensor:
        people = [self._read(image, *circle) for circle in self._circles(image)]
        found = [person for person in people if person is not None]
        return from_coco(torch.from_numpy(np.stack(found))) if found else torch.zeros(0, 18, 3)

    def _circles(self, image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """The middle of each person's hips and a point of the circle around the whole person, (x, y) in pixels."""
        side = image.shape[0]
        small = cv2.resize(image, (DETECTOR_SIDE, DETECTOR_SIDE), interpolation=cv2.INTER_AREA)
        rows, logits = _run(self.detector, small.astype(np.float32) / 127.5 - 1)
        scores = 1 / (1 + np.exp(-logits[:, 0].clip(-80, 80)))
        sure = scores >= self.least_person
        # Places are relative to the anchor's, in pixels of what the detector sees.
        rows, anchors = rows[sure] / DETECTOR_SIDE, self.anchors[sure]
        centres = rows[:, :2] + anchors
        boxes = np.concatenate([centres - rows[:, 2:4] / 2, centres + rows[:, 2:4] / 2], -1)
        points = rows[:, 4:8].reshape(-1, 2, 2) + anchors[:, None]
        return [tuple(points[index] * side - 0.5) for index in _apart(boxes, scores[sure])]

    def _read(self, image: np.ndarray, hips: np.ndarray, top: np.ndarray) -> np.ndarray | None:
        """COCO's 17 keypoints (17, 3) of the person in a circle, or None where there is none after all."""
        radius = max(float(np.linalg.norm(top - hips)), 1.0) * MARGIN
        up = math.atan2(top[1] - hips[1], top[0] - hips[0])
        # From what the network sees, upright, to the image: the person's up is the direction of the circle's point.
        scale, turn = 2 * radius / LANDMARK_SIDE, up + math.pi / 2
        rotation = scale * np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        middle = (LANDMARK_SIDE - 1) / 2
        moved = np.concatenate([rotation, (hips - rotation @ [middle, middle])[:, None]], 1)
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        upright = cv2.warpAffine(image, moved, (LANDMARK_SIDE, LANDMARK_SIDE), flags=flags)
        rows, presence = _run(self.landmarks, upright.astype(np.float32) / 255)[:2]
        if float(presence.reshape(())) < self.least_person:
            return None
        points = rows.reshape(-1, 5)[list(COCO_OF)]
        places = (points[:, :2] - 0.5) @ rotation.T + moved[:, 2]
        seen = 1 / (1 + np.exp(-points[:, 3:].min(-1)))  # of visibility and presence
        return np.concatenate([places, (seen >= self.least_keypoint)[:, None]], -1).astype(np.float32)


def _anchors(side: int, count: int) -> np.ndarray:
    """The centres of a layer's anchors, (x, y) in shares of the image."""
    places = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(places, places)
    return np.repeat(np.stack([x, y], -1).reshape(-1, 2), count, 0)


def _apart(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Indices of boxes (left, top, right, bottom), best first, without those that overlap a better one."""
    kept: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if all(_overlap(boxes[index], boxes[other]) < OVERLAP for other in kept):
            kept.append(int(index))
    return kept


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    sides = (np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])).clip(0)
    areas = np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])
    return float(sides.prod() / max(areas - sides.prod(), 1e-9))


class Interpreter(Protocol):
    """What is used of TensorFlow Lite's."""

    def allocate_tensors(self) -> None: ...

    def get_input_details(self) -> list[dict[str, int]]: ...

    def get_output_details(self) -> list[dict[str, int]]: ...

    def set_tensor(self, index: int, value: np.ndarray) -> None: ...

    def invoke(self) -> None: ...

    def get_tensor(self, index: int) -> np.ndarray: ...


def _interpreter(key: str, folder: str, name: str, threads: int) -> Interpreter:
    try:
        from ai_edge_litert import interpreter as litert
    except ImportError as error:
        raise ValueError(
            f"{name}: expected the package ai-edge-litert, found none: pip install ai-edge-litert"
        ) from error
    path = find_model(key, folder, name, "the wheel of mediapipe 0.10.21")
    try:
        interpreter = litert.Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a model of TensorFlow Lite, found {error}") from error
    return interpreter


def _run(interpreter: Interpreter, image: np.ndarray) -> list[np.ndarray]:
    """The outputs, each without its first axis, in the order of their names."""
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
    interpreter.invoke()
    return [interpreter.get_tensor(output["index"])[0] for output in interpreter.get_output_details()]
