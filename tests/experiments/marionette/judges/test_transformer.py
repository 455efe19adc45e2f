import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.marionette.judges.data import make_renders
from experiments.marionette.judges.transformer import Batch, draw_batch, recolour, run, set_loss, smear
from rg.detectors.transformer import PoseTransformer


def batch(n: int = 8, size: int = 16) -> Batch:
    images = make_renders(3, "train", n, side=64, kinds={"one": 0.5, "two": 0.5})
    return draw_batch(images, torch.zeros_like(images.image), size, torch.Generator().manual_seed(0))


def test_batch_holds_people_in_whole_images_and_some_empty_ones() -> None:
    drawn = batch()
    assert drawn.images.shape == (16, 3, 64, 64) and drawn.images.abs().max() <= 1
    assert drawn.keypoints.shape == (16, 2, 18, 3)
    assert drawn.present.any(1).tolist() == [True] * 14 + [False] * 2
    assert set(drawn.present[:14].sum(1).tolist()) == {1, 2}


def test_colours_change_and_smears_keep_the_mean() -> None:
    images = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    mixed = recolour(images, generator)
    assert mixed.shape == images.shape and not torch.allclose(mixed, images, atol=0.05)
    flat = images.mean((2, 3), keepdim=True).expand_as(images)
    torch.testing.assert_close(smear(flat, generator), flat)
    smeared = smear(images, generator)
    rough = (smeared.std((1, 2, 3)) / images.std((1, 2, 3))).sort().values
    assert rough[0] < 0.6 and (rough > 0.999).float().mean() == pytest.approx(0.5, abs=0.2)


def planted(keypoints: torch.Tensor, queries: list[int], count: int = 3) -> tuple[torch.Tensor, ...]:
    """Logits of a network that is sure of each of keypoints (1, P, 18, 3), at whole cells, by the query named."""
    cells, absent = torch.full((1, count, 18, 8, 8), -30.0), torch.full((1, count, 18), -30.0)
    present = torch.full((1, count), -30.0)
    for person, query in enumerate(queries):
        x, y = ((keypoints[0, person, :, i] - 0.5) / 2 for i in (0, 1))
        cells[0, query, torch.arange(18), y.long(), x.long()] = 30.0
        present[0, query] = 30.0
    return cells, absent, present


def test_loss_does_not_mind_which_query_finds_whom() -> None:
    places = torch.randint(8, (1, 2, 18, 2), generator=torch.Generator().manual_seed(0)) * 2 + 0.5
    keypoints = torch.cat([places, torch.ones(1, 2, 18, 1)], -1)
    there = torch.ones(1, 2, dtype=torch.bool)
    drawn = Batch(torch.zeros(1, 3, 16, 16), keypoints, there)
    for queries in ([0, 1], [2, 0], [1, 2]):
        assert set_loss(*planted(keypoints, queries), drawn, (16, 16)) < 1e-5
    cells, absent, present = planted(keypoints, [0, 1])
    # One whom two queries find, one whom none does.
    assert set_loss(*planted(keypoints[:, [0, 0]], [0, 1]), drawn, (16, 16)) > 10
    alone = drawn._replace(present=torch.tensor([[True, False]]))
    # A query that finds somebody who is not there is wrong by 30, of three.
    assert set_loss(cells, absent, present, alone, (16, 16)).item() == pytest.approx(10, rel=1e-4)
    nobody = drawn._replace(present=torch.tensor([[False, False]]))
    assert set_loss(cells, absent, present, nobody, (16, 16)).item() == pytest.approx(20, rel=1e-4)
    # Without any opinion: the logarithm of 65 places, and of two answers to whether there is somebody.
    loss = set_loss(cells * 0, absent * 0, present * 0, drawn, (16, 16)).item()
    assert loss == pytest.approx(math.log(65) + math.log(2), rel=1e-5)


@pytest.mark.slow
def test_command_writes_weights_and_a_card_that_compares(settings: dict[str, Any]) -> None:
    settings |= {"encoder_layers": 1, "decoder_layers": 1, "people": 2, "other": "detector"}
    card = run(settings)
    folder = Path(settings["output"])
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert (folder / "README.md").read_text() == card
    assert "| images | both right | both wrong | one right | pixels apart |" in card
    assert PoseTransformer.from_pretrained(folder).config["people"] == 2


@pytest.mark.slow
def test_overfits_one_batch() -> None:
    drawn = batch(4, 8)
    torch.manual_seed(0)
    network = PoseTransformer(widths=(16, 32, 32), encoder_layers=1, decoder_layers=1, people=2, threshold=0.5)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(400):
        loss = set_loss(*network(drawn.images), drawn, (64, 64))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    found = network.eval().detect(drawn.images, 2)
    assert torch.equal(found.present.sum(1), drawn.present.sum(1))
