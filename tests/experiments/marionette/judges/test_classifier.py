from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.marionette.stage import LABELS
from data_prep.marionette.vocabulary import ATTRIBUTES
from experiments.marionette.judges.classifier import (
    MIRROR,
    NAMES,
    accuracy,
    attention_loss,
    attribute_masks,
    classification_loss,
    draw_batch,
    run,
)
from experiments.marionette.judges.data import SECOND_PERSON, Renders, make_renders
from rg.detectors.attributes import AttributeClassifier


def test_mirroring_exchanges_the_people_only() -> None:
    names = dict(zip(NAMES, (NAMES[i] for i in MIRROR), strict=True))
    assert names["shirt"] == "second_shirt" and names["second_hair_length"] == "hair_length"
    assert all(names[name] == name for name in ("people", "portrait", "sky", "ground"))


def test_batch_exchanges_the_attributes_of_two_people_with_their_places() -> None:
    classes = torch.arange(len(NAMES)).repeat(2, 1)
    classes[:, NAMES.index("people")] = torch.tensor([1, 0])
    bright = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    bright[..., :32] = 255
    parts = torch.full((2, 64, 64), LABELS.index("trunk"), dtype=torch.uint8)
    parts[..., 32:] += SECOND_PERSON
    renders = Renders(bright, torch.zeros(2, 2, 18, 3), classes, parts)
    images, found, masks = draw_batch(renders, 32, torch.Generator().manual_seed(0))
    assert images.shape == (32, 3, 64, 64) and images.abs().max() <= 1
    mirrored = images[..., 32:].mean((1, 2, 3)) > images[..., :32].mean((1, 2, 3))
    two = found[:, NAMES.index("people")] == 1
    shirt, other = (found[:, NAMES.index(name)] for name in ("shirt", "second_shirt"))
    assert torch.equal(shirt > other, mirrored & two)
    assert len({*zip(mirrored.tolist(), two.tolist(), strict=True)}) == 4
    # The left one of two people is on the left also after mirroring; one person is the same one on either side.
    assert masks.shape == (32, len(NAMES), 32, 32)
    left = masks[:, NAMES.index("shirt"), :, :16].mean((1, 2)) > 0.6
    assert torch.equal(left, two | ~mirrored)


def test_attributes_are_seen_on_their_parts() -> None:
    codes = [LABELS.index("hair"), LABELS.index("hips") + SECOND_PERSON, LABELS.index("ground"), LABELS.index("thing")]
    masks = attribute_masks(torch.tensor(codes, dtype=torch.uint8).view(1, 2, 2))
    assert masks.shape == (1, len(NAMES), 2, 2)
    seen = {name: mask.flatten().tolist() for name, mask in zip(NAMES, masks[0], strict=True) if mask.any()}
    assert seen == {
        **{name: [True, False, False, False] for name in ("hat", "glasses", "hair", "hair_length")},
        "second_trousers": [False, True, False, False],
        "ground": [False, False, True, False],
    }


def test_attention_must_stay_on_what_is_shown() -> None:
    maps = torch.tensor([0.5, 0.25, 0.25, 0.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    masks = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]).view(1, 3, 2, 2)
    torch.testing.assert_close(attention_loss(maps, masks), torch.tensor(8.0).log() / 2)


def test_loss_counts_what_applies() -> None:
    logits = {name: torch.zeros(2, len(classes), requires_grad=True) for name, classes in ATTRIBUTES.items()}
    classes = torch.full((2, len(NAMES)), -1)
    classes[0, NAMES.index("sky")], classes[1, NAMES.index("shirt")] = 3, 7
    expected = (torch.tensor(4.0).log() + torch.tensor(8.0).log()) / 2
    loss = classification_loss(logits, classes)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits["sky"].grad[0].abs().sum() > 0 and logits["sky"].grad[1].abs().sum() == 0
    assert logits["people"].grad.abs().sum() == 0


def test_command_runs_and_writes_a_card(settings: dict[str, Any]) -> None:
    card = run(settings)
    folder = Path(settings["output"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text() == card
    assert all(f"| {name.replace('_', ' ')} | {len(classes)} |" in card for name, classes in ATTRIBUTES.items())
    before = AttributeClassifier.from_pretrained(folder)
    assert before.attributes == ATTRIBUTES
    run(settings)  # finished already: the same weights
    after = AttributeClassifier.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


@pytest.mark.slow
def test_overfits_a_few_images() -> None:
    images = make_renders(3, "train", 8, side=64, kinds={"one": 0.5, "two": 0.5})
    torch.manual_seed(0)
    classifier = AttributeClassifier(attributes=ATTRIBUTES, widths=(16, 24, 32))
    optimizer = torch.optim.AdamW(classifier.parameters(), 3e-3)
    for _ in range(150):
        loss = classification_loss(classifier(images.image.float() / 127.5 - 1), images.classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = accuracy(classifier.eval(), images.image, images.classes, "cpu")
    assert all(share == 1 or share != share for share in right.values()), right
