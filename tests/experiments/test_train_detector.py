from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.marionette import render
from experiments import train_detector
from experiments.detector_pictures import (
    Pictures,
    augment,
    draw_batch,
    from_bytes,
    largest_person,
    make_empty,
    make_training_pictures,
    render_people,
    to_bytes,
)
from experiments.detector_quality import choose_threshold
from experiments.train_detector import Training, detection_loss, run
from rg.backbone import DiffusionBackbone
from rg.detectors import KeypointDetector
from rg.metrics import PCK

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    folder = ROOT / "rg/models/marionette"
    sizes = {"pictures": 12, "held_out": 4, "steps": 3, "batch_size": 8, "learning_rate": 2e-3, "widths": [8, 8, 8]}
    places = {"output": str(tmp_path / "detector"), "checkpoint": str(tmp_path / "run/last.pt")}
    return {"backbone": str(folder), "device": "cpu", "seed": 1, **places, **sizes}


def pictures(n: int = 4) -> Pictures:
    image, keypoints = render_people(3, "train", n, side=64, kinds={"one": 1.0})
    return Pictures(image, keypoints, torch.zeros_like(image))


def test_bytes_there_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(values)), values)


def test_splits_and_pictures_are_reproducible_and_differ() -> None:
    first, again = (render_people(3, "train", 3, side=64, kinds={"one": 1.0})[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, render_people(3, "quality", 3, side=64, kinds={"one": 1.0})[0])


def test_largest_person_is_taken() -> None:
    keypoints = torch.zeros(2, 2, 18, 3)
    keypoints[0, 0, 3, 0], keypoints[0, 1, 3, 1] = 5, 9
    keypoints[1, 0, 3, 0] = 5
    assert torch.equal(largest_person(keypoints), torch.stack([keypoints[0, 1], keypoints[1, 0]]))


def test_empty_pictures_of_a_tiny_backbone(tiny_pipeline: Callable[..., Any]) -> None:
    backbone = DiffusionBackbone(tiny_pipeline())
    people = render([(5, i) for i in range(7)], resolution=32, kinds={"one": 1.0}).image
    empty = make_empty(1, "train", people, backbone, torch.Generator().manual_seed(0))
    assert empty.shape == people.shape and empty.dtype == torch.uint8
    # In turn: rows of one colour, the same pixels elsewhere, noise.
    assert (empty[0] == empty[0, :, :, :1]).all()
    assert torch.equal(empty[1].flatten(1).sort().values, people[0].flatten(1).sort().values)
    assert not torch.equal(empty[1], people[0])


def test_training_pictures_of_a_tiny_backbone(tiny_pipeline: Callable[..., Any]) -> None:
    made = make_training_pictures(DiffusionBackbone(tiny_pipeline()), 1, 8)
    plain, keypoints = render_people(1, "train", 8, side=32, kinds={"one": 0.8, "two": 0.1, "portrait": 0.1})
    assert torch.equal(made.keypoints, keypoints)
    assert [torch.equal(a, b) for a, b in zip(made.image, plain, strict=True)] == [True, False] * 4


def test_augmented_keypoints_stay_on_their_pixels() -> None:
    """A bright dot drawn at each keypoint is found where augmentation says that the keypoint went."""
    keypoints = torch.zeros(16, 18, 3)
    keypoints[:, :, 0], keypoints[:, :, 1] = 40, 25
    # A pair of sides whose dots differ, so that a mirrored picture must swap them.
    keypoints[:, 2, :2], keypoints[:, 5, :2] = torch.tensor([20.0, 30.0]), torch.tensor([44.0, 38.0])
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.full((16, 3, 64, 64), -0.7)
    for channel, k in enumerate((2, 5)):
        x, y = keypoints[0, k, :2]
        images[:, channel] += 1.4 * torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    moved, points = augment(images, keypoints, torch.Generator().manual_seed(0))
    swapped = 0
    for image, now in zip(moved, points, strict=True):
        weight = (image - image.median()).clamp_min(0.5) - 0.5
        centres = torch.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], -1)[:2]
        centres = centres / weight[:2].sum((1, 2))[:, None]
        straight, mirrored = ((centres - now[order, :2]).norm(dim=-1).max() for order in ([2, 5], [5, 2]))
        assert min(straight, mirrored) < 0.5
        swapped += int(mirrored < straight)
    assert 0 < swapped < 16


def test_batch_holds_empty_pictures_with_keypoints_outside() -> None:
    images, keypoints = draw_batch(pictures(), 16, torch.Generator().manual_seed(0))
    assert images.shape == (16, 3, 64, 64) and images.min() >= -1 and images.max() <= 1
    assert (keypoints[-2:, :, :2].abs().amax(-1) > 1000).all() and (keypoints[:-2, :, :2].abs() < 200).all()


def test_loss_is_least_for_the_distribution_around_the_keypoint() -> None:
    keypoints = torch.zeros(1, 18, 3)
    keypoints[..., :2] = torch.tensor([21.0, 10.5])  # cell (10.25, 5): shares 3/4 and 1/4
    right = torch.full((1, 18, 32, 32), -30.0)
    right[..., 5, 10], right[..., 5, 11] = torch.tensor([0.75, 0.25]).log()
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    absent = torch.full((1, 18), -30.0)
    # A hidden keypoint counts half, a visible one fully, one outside the picture as absent.
    torch.testing.assert_close(detection_loss(right, absent, keypoints, (64, 64)), entropy / 2)
    keypoints[..., 2] = 1
    torch.testing.assert_close(detection_loss(right, absent, keypoints, (64, 64)), entropy)
    assert detection_loss(right.roll(1, -1), absent, keypoints, (64, 64)) > entropy + 1
    keypoints[..., 0] = 64
    assert detection_loss(right, absent + 60, keypoints, (64, 64)) < 1e-3


def test_loss_has_the_gradient_that_it_should() -> None:
    cells = torch.randn(2, 18, 4, 4, dtype=torch.float32, requires_grad=True)
    absent = torch.randn(2, 18, requires_grad=True)
    keypoints = torch.rand(2, 18, 3) * 10 - 1
    detection_loss(cells, absent, keypoints, (8, 8)).backward()
    # Softmax minus target sums to 0 over the cells and absence of each keypoint.
    torch.testing.assert_close(cells.grad.sum((2, 3)) + absent.grad, torch.zeros(2, 18), atol=1e-6, rtol=0)


def test_threshold_lies_between_people_and_empty_pictures() -> None:
    assert choose_threshold(torch.linspace(0.7, 0.9, 101), torch.linspace(0, 0.1, 101)) == pytest.approx(0.4, abs=0.01)
    # Where they overlap, people go first.
    assert choose_threshold(torch.full((9,), 0.3), torch.full((9,), 0.5)) == pytest.approx(0.3)


def test_command_runs_and_resumes_to_the_same_weights(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = run(settings)
    folder = Path(settings["output"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text() == card and "| renders | visible |" in card
    whole = KeypointDetector.from_pretrained(folder)

    Path(settings["checkpoint"]).unlink()
    made = make_training_pictures(DiffusionBackbone.from_pretrained(settings["backbone"]), 1, 12)
    killed = Training(settings)
    killed.advance(made)
    killed.save()
    monkeypatch.setattr(train_detector, "SAVE_EVERY", 1)
    run(settings)
    for a, b in zip(whole.parameters(), KeypointDetector.from_pretrained(folder).parameters(), strict=True):
        assert torch.equal(a, b)
    # Other settings start afresh.
    assert Training(settings).step == 3 and Training({**settings, "seed": 2}).step == 0


@pytest.mark.slow
def test_overfits_one_batch(settings: dict[str, Any]) -> None:
    few = pictures(4)
    training = Training({**settings, "widths": [32, 32, 32], "steps": 300, "checkpoint": settings["checkpoint"]})
    for _ in range(300):
        training.advance(few)
    metric = PCK(alphas=(0.1,))
    found = training.detector.eval().detect(from_bytes(few.image))
    metric.update(found.points, few.keypoints[..., :2], few.keypoints[..., 2] > 0)
    assert metric.compute()[0.1]["mean"] > 0.9
