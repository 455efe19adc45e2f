"""The same person: boxes around faces by hand, and what a run without faces does."""

import torch

from experiments.applications.same_person import FACE, MARGIN, NECK, face_boxes
from rg.detectors.detection import Detection

SIZE = (64, 64)


def seen(face: tuple[float, float], neck: tuple[float, float], sure: float) -> Detection:
    points, confidence = torch.zeros(1, 1, 18, 2), torch.zeros(1, 1, 18)
    points[0, 0, FACE], points[0, 0, NECK] = torch.tensor(face).float(), torch.tensor(neck).float()
    confidence[0, 0, [*FACE, NECK]] = sure
    return Detection(points, confidence, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))


def test_a_face_is_as_large_as_it_is_far_from_the_neck():
    half = 12 * MARGIN / 2 + 4
    box = face_boxes(seen((30, 26), (30, 38), 0.9), SIZE)
    assert torch.allclose(box, torch.tensor([[30 - half, 26 - half, 30 + half, 26 + half]]))


def test_a_box_stays_in_the_image_and_is_all_of_it_where_no_face_is_sure():
    left, top, right, bottom = face_boxes(seen((2, 2), (2, 20), 0.9), SIZE)[0].tolist()
    assert left == top == 0 and 8 <= right < 64 and 8 <= bottom < 64
    assert face_boxes(seen((30, 26), (30, 38), 0.2), SIZE).tolist() == [[0, 0, 64, 64]]
