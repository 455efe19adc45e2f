from pathlib import Path

import pytest
import torch

from rg.detectors.attributes import AttributeClassifier

ATTRIBUTES = {
    "people": ("one", "two"), "portrait": ("no", "yes"), "ground": ("grass", "sand"), "shirt": ("red", "blue", "green"),
    "trousers": ("red", "blue"), "second_shirt": ("red", "blue", "green"),
}  # fmt: skip


@pytest.fixture
def classifier() -> AttributeClassifier:
    torch.manual_seed(0)
    return AttributeClassifier(attributes=ATTRIBUTES, widths=(8, 16, 24), key_width=8).eval()


def batch(n: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return 2 * torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) - 1


@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_shapes_and_ranges(classifier: AttributeClassifier, size: tuple[int, int]) -> None:
    images = batch(3, *size)
    logits = classifier(images)
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        name: (3, len(classes)) for name, classes in ATTRIBUTES.items()
    }
    maps, values, overview = classifier.attention(images)
    assert maps.shape == (3, 6, size[0] // 2, size[1] // 2) and values.shape == (3, 24, *maps.shape[2:])
    assert overview.shape == classifier.embed(images).shape == (3, 24)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(3, 6))
    for name, shares in classifier.probabilities(images).items():
        torch.testing.assert_close(shares, logits[name].softmax(-1))


def test_a_read_out_is_what_attention_points_at(classifier: AttributeClassifier) -> None:
    """With attention on one cell, the logits are the head's of that cell's value and the overview."""
    images = batch(1)
    _, values, overview = classifier.attention(images)
    cell = torch.zeros(1, 6, 32, 32)
    cell[:, :, 5, 7] = 1
    classifier.attention = lambda _: (cell, values, overview)
    expected = classifier.heads["shirt"](torch.cat([values[:, :, 5, 7], overview], 1))
    torch.testing.assert_close(classifier(images)["shirt"], expected)


def test_words_are_those_that_apply(classifier: AttributeClassifier) -> None:
    def say(**numbers: int) -> dict[str, str]:
        with torch.no_grad():
            for name, head in classifier.heads.items():
                head.weight.zero_()
                head.bias.zero_()[numbers.get(name, 0)] = 1
        (words,) = classifier.read(batch(1))
        return words

    assert say(shirt=2) == {"people": "one", "portrait": "no", "ground": "grass", "shirt": "green", "trousers": "red"}
    assert say(portrait=1, second_shirt=1) == {"people": "one", "portrait": "yes", "shirt": "red"}
    assert say(people=1, second_shirt=1)["second_shirt"] == "blue"


def test_an_image_does_not_depend_on_its_neighbours(classifier: AttributeClassifier) -> None:
    images = batch()
    for name, logits in classifier(images).items():
        torch.testing.assert_close(classifier(images[1:2])[name], logits[1:2], atol=1e-4, rtol=0)


def test_stored_and_loaded_is_the_same(classifier: AttributeClassifier, tmp_path: Path) -> None:
    classifier.save_pretrained(tmp_path)
    loaded = AttributeClassifier.from_pretrained(tmp_path)
    assert loaded.config == classifier.config and loaded.attributes == ATTRIBUTES and not loaded.training
    torch.testing.assert_close(loaded(batch())["shirt"], classifier(batch())["shirt"], atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"multiples of 8.*\(1, 3, 60, 64\)"):
        loaded.read(batch(1, 60, 64))
