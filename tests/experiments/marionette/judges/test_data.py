from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_prep.marionette.render import render
from data_prep.marionette.stage import LABELS
from data_prep.marionette.vocabulary import ATTRIBUTES, UNSEEN_PAIRS
from experiments.marionette.judges.data import (
    KINDS,
    SECOND_PERSON,
    class_numbers,
    load_training_renders,
    make_empty,
    make_renders,
    make_training_renders,
    through_autoencoder,
)
from rg.backbone.diffusion import DiffusionBackbone
from rg.io.images import from_bytes, to_bytes

ONE = {"one": 1.0}


def test_bytes_there_and_back() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(from_bytes(values)), values)


def test_classes_are_numbers_and_what_does_not_apply_is_marked() -> None:
    (row,) = class_numbers([{"people": "two", "hat": "none", "second_glasses": "yes"}])
    assert dict(zip(ATTRIBUTES, row.tolist(), strict=True)) == {
        **dict.fromkeys(ATTRIBUTES, -1), "people": 1, "hat": 0, "second_glasses": 1
    }  # fmt: skip


def test_splits_and_images_are_reproducible_and_differ() -> None:
    first, again = (make_renders(3, "train", 3, side=32, kinds=ONE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.image, make_renders(3, "quality", 3, side=32, kinds=ONE).image)
    stills = render([(3, 0, index) for index in range(3)], resolution=32, kinds=ONE)
    assert torch.equal(first.image, stills.image) and torch.equal(first.keypoints, stills.keypoints)
    assert torch.equal(first.classes, class_numbers(stills.attributes))
    assert first.parts.dtype == torch.uint8 and torch.equal(first.parts, stills.parts)


def test_parts_of_the_second_person_have_numbers_of_their_own() -> None:
    two = {"two": 1.0}
    stills, images = render([(3, 0, 0)], resolution=32, kinds=two), make_renders(3, "train", 1, side=32, kinds=two)
    second = images.parts >= SECOND_PERSON
    assert torch.equal(second, stills.instances == 2) and second.any()
    assert len(LABELS) <= SECOND_PERSON and torch.equal(images.parts % SECOND_PERSON, stills.parts)


def test_every_eighth_image_has_colours_never_seen_together() -> None:
    classes = make_renders(3, "train", 16, side=16, kinds=ONE).classes
    shirt, trousers = (classes[:, list(ATTRIBUTES).index(name)] for name in ("shirt", "trousers"))
    colors = ATTRIBUTES["shirt"]
    unseen = [UNSEEN_PAIRS[colors[a]] == colors[b] for a, b in zip(shirt, trousers, strict=True)]
    assert [i for i, is_unseen in enumerate(unseen) if is_unseen] == [7, 15]


def test_the_autoencoder_gives_its_mean_or_a_sample(tiny_pipeline: Callable[..., Any]) -> None:
    backbone = DiffusionBackbone(tiny_pipeline())
    images = make_renders(3, "train", 2, side=32, kinds=ONE).image
    mean = through_autoencoder(images, backbone)
    exact = to_bytes(backbone.decode(backbone.encode(from_bytes(images))[0]))
    # One level where the processor multiplies in bfloat16; a sample differs by forty.
    assert mean.dtype == torch.uint8 and (mean.int() - exact.int()).abs().float().mean() < 3
    sample = through_autoencoder(images, backbone, torch.Generator().manual_seed(0))
    assert not torch.equal(sample, mean)
    assert torch.equal(sample, through_autoencoder(images, backbone, torch.Generator().manual_seed(0)))


def test_empty_images_of_a_tiny_backbone(tiny_pipeline: Callable[..., Any]) -> None:
    backbone = DiffusionBackbone(tiny_pipeline())
    people = make_renders(5, "train", 7, side=32, kinds=ONE).image
    empty = make_empty(5, "train", people, backbone, torch.Generator().manual_seed(0))
    assert empty.shape == people.shape and empty.dtype == torch.uint8
    # In turn: the scene without its person (the sky above is the same), the same pixels elsewhere, noise.
    assert not torch.equal(empty[0], people[0]) and (empty[0, :, 0].int() - people[0, :, 0].int()).abs().max() < 12
    assert torch.equal(empty[1].flatten(1).sort().values, people[0].flatten(1).sort().values)
    assert not torch.equal(empty[1], people[0])


def test_training_images_are_kept(tiny_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    backbone = DiffusionBackbone(tiny_pipeline())
    made, empty = make_training_renders(backbone, 1, 8)
    plain = make_renders(1, "train", 8, side=32, kinds=KINDS)
    assert torch.equal(made.keypoints, plain.keypoints) and len(empty) == 3
    assert [torch.equal(a, b) for a, b in zip(made.image, plain.image, strict=True)] == [True, False] * 4
    settings = {"seed": 1, "images": 8, "cache": str(tmp_path)}
    for _ in range(2):
        images, nobody = load_training_renders(backbone, settings)
        assert all(torch.equal(a, b) for a, b in zip([*images, nobody], [*made, empty], strict=True))
        assert len(list(tmp_path.iterdir())) == 1
    other = DiffusionBackbone(tiny_pipeline(seed=1))
    load_training_renders(other, settings)
    assert len(list(tmp_path.iterdir())) == 2
