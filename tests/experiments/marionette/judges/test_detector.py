from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.marionette.judges.data import Renders, is_present, make_renders
from experiments.marionette.judges.detector import Batch, detection_loss, draw_batch, person_loss, run
from experiments.marionette.judges.training import train
from rg.backbone.diffusion import DiffusionBackbone
from rg.detectors.keypoints import KeypointDetector, boxes_around, overlap


def batch(n: int = 8, size: int = 16) -> tuple[Renders, Batch]:
    images = make_renders(3, "train", n, side=64, kinds={"one": 0.5, "two": 0.5})
    return images, draw_batch(images, torch.zeros_like(images.image), size, torch.Generator().manual_seed(0))


def test_absent_people_are_all_zero() -> None:
    keypoints = torch.zeros(2, 2, 18, 3)
    keypoints[0, 1, 3, 0] = 5
    assert is_present(keypoints).tolist() == [[False, True], [False, False]]


def test_batch_holds_whole_images_and_crops_and_some_empty_ones() -> None:
    _, drawn = batch()
    assert drawn.images.shape == (16, 3, 64, 64) and drawn.crops.shape == (16, 3, 64, 64)
    assert drawn.images.abs().max() <= 1 and drawn.crops.abs().max() <= 1
    assert drawn.present.any(1).tolist() == [True] * 14 + [False] * 2
    assert set(drawn.present[:14].sum(1).tolist()) == {1, 2}
    assert (drawn.keypoints[-2:, :, :2] < -1000).all()
    # Whoever is cut out fills most of the crop: MARGIN and a jitter of the box.
    sides = boxes_around(drawn.keypoints[:14], (64, 64))[:, 2:].amax(1)
    assert (sides > 64 / 1.25 / 1.2 - 1).all()
    boxes = drawn.boxes[drawn.present]
    assert (boxes[:, :2] >= -0.5).all() and (boxes[:, :2] <= 63.5).all()
    assert (boxes[:, 2:] > 0).all() and (boxes[:, 2:] <= 64).all()


def test_loss_is_least_for_the_distribution_around_the_keypoint() -> None:
    keypoints = torch.zeros(1, 18, 3)
    keypoints[..., :2] = torch.tensor([21.0, 10.5])  # cell (10.25, 5): shares 3/4 and 1/4
    right = torch.full((1, 18, 32, 32), -30.0)
    right[..., 5, 10], right[..., 5, 11] = torch.tensor([0.75, 0.25]).log()
    entropy = -(0.75 * torch.tensor(0.75).log() + 0.25 * torch.tensor(0.25).log())
    absent = torch.full((1, 18), -30.0)
    # A hidden keypoint counts half, a visible one fully, one outside the image as absent.
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


def test_person_loss_is_least_for_the_right_boxes_alone() -> None:
    target = torch.tensor([[[13.5, 17.5, 8.0, 16.0], [0, 0, 0, 0]]])  # centred in cell (row 4, column 3)
    present = torch.tensor([[True, False]])
    boxes = target[:, :1, None].expand(1, 8, 8, 4).clone()
    scores = torch.full((1, 8, 8), -10.0)
    scores[0, 4, 3] = 10.0
    assert person_loss(scores, boxes, target, present) < 1e-3
    # Far from the centre boxes do not count, near it they do: half a cell of eight, and a factor of e.
    boxes[0, 0, 0] = 1.0
    assert person_loss(scores, boxes, target, present) < 1e-3
    boxes[..., 0] += 4
    boxes[..., 3] *= torch.e
    torch.testing.assert_close(person_loss(scores, boxes, target, present), torch.tensor(1.25), atol=1e-3, rtol=0)
    # The cell of the person who is not there must be silent; the one who is there must not be missed.
    for row, column, score in ((0, 0, 10.0), (4, 3, -10.0)):
        wrong = scores.clone()
        wrong[0, row, column] = score
        assert person_loss(wrong, boxes, target, present) > 5


def test_person_loss_gives_each_cell_to_the_nearest_person() -> None:
    target = torch.tensor([[[5.5, 13.5, 12.0, 24.0], [25.5, 13.5, 8.0, 16.0]]])  # columns 1 and 6, row 3
    boxes = target[:, 0, None, None].expand(1, 8, 8, 4).clone()
    boxes[:, :, 4:] = target[:, 1, None, None]
    scores = torch.full((1, 8, 8), -10.0)
    scores[0, 3, [1, 6]] = 10.0
    assert person_loss(scores, boxes, target, torch.ones(1, 2, dtype=torch.bool)) < 1e-3


@pytest.mark.slow
def test_command_runs_and_resumes_to_the_same_weights(settings: dict[str, Any]) -> None:
    settings["finder_widths"] = [8, 8, 8]
    embedded = DiffusionBackbone.from_pretrained(settings["backbone"], device="cpu")
    card = run(settings)
    folder = Path(settings["output"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text() == card
    assert "| one person, renders | visible |" in card and "| nobody |" in card
    whole = KeypointDetector.from_pretrained(folder)

    def differs() -> bool:
        resumed = KeypointDetector.from_pretrained(folder).state_dict()
        return any(not torch.equal(weights, resumed[name]) for name, weights in whole.state_dict().items())

    settings["folder"] += "-again"
    run(settings, deadline=0.0)
    losses = next(Path(settings["folder"]).rglob("losses.csv"))
    assert len(losses.read_text().splitlines()) == 1 + 1 and differs()
    run(settings)
    assert len(losses.read_text().splitlines()) == 1 + settings["steps"] and not differs()
    # Other settings start afresh, in a folder of their own.
    train(whole, lambda network, *_: next(network.parameters()).sum(), embedded, settings | {"learning_rate": 1.0}, 0.0)
    assert len(list(Path(settings["folder"]).iterdir())) == 2


@pytest.mark.slow
def test_overfits_one_batch() -> None:
    _, drawn = batch(4, 8)
    torch.manual_seed(0)
    detector = KeypointDetector(widths=(32, 32, 32), finder_widths=(16, 16, 16), threshold=0.5)
    optimizer = torch.optim.AdamW(detector.parameters(), 3e-3)
    for _ in range(300):
        cells, absent = detector(drawn.crops)
        scores, boxes = detector.finder(drawn.images)
        loss = detection_loss(cells, absent, drawn.keypoints, (64, 64))
        loss = loss + person_loss(scores, boxes, drawn.boxes, drawn.present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    boxes, scores = detector.eval().finder.find(drawn.images, 2)
    assert torch.equal(scores > 0.3, drawn.present.sort(1, descending=True).values)
    best = overlap(boxes[:, :, None], drawn.boxes[:, None]).amax(1)
    assert best[drawn.present].min() > 0.7
