from pathlib import Path

import pytest
import torch

from rg.detectors.transformer import PoseTransformer


@pytest.fixture
def detector() -> PoseTransformer:
    torch.manual_seed(0)
    return PoseTransformer(widths=(8, 16, 16), encoder_layers=1, decoder_layers=1, people=3, threshold=0.1).eval()


def batch(n: int = 3, size: tuple[int, int] = (32, 32)) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_shapes_and_ranges(detector: PoseTransformer, size: tuple[int, int]) -> None:
    images = batch(2, size)
    cells, absent, present = detector(images)
    assert cells.shape == (2, 3, 18, size[0] // 2, size[1] // 2)
    assert absent.shape == (2, 3, 18) and present.shape == (2, 3)
    found = detector.detect(images, 2)
    assert found.points.shape == (2, 2, 18, 2) and found.confidence.shape == (2, 2, 18)
    limits = torch.tensor([size[1], size[0]]) - 0.5
    assert (found.points >= -0.5).all() and (found.points <= limits).all()
    assert (found.confidence >= 0).all() and (found.confidence <= 1).all()
    assert (found.score[:, 0] >= found.score[:, 1]).all()
    assert torch.equal(found.present, found.score >= 0.1)


def test_the_surest_people_come_first_and_nobody_is_made_up(detector: PoseTransformer) -> None:
    images = batch()
    three, five, one = (detector.detect(images, people) for people in (3, 5, 1))
    for name in ("points", "confidence", "score", "present"):
        assert torch.equal(getattr(five, name)[:, :3], getattr(three, name))
        assert torch.equal(getattr(one, name), getattr(three, name)[:, :1])
        assert not getattr(five, name)[:, 3:].any()
    with torch.no_grad():
        detector.present.bias.fill_(-100)
    assert not detector.detect(images, 3).present.any()


def test_a_keypoint_that_is_absent_has_no_confidence(detector: PoseTransformer) -> None:
    with torch.no_grad():
        detector.absent.bias.fill_(100)
    assert detector.detect(batch()).confidence.max() < 1e-6


def test_where_a_map_has_its_mass_is_the_keypoint(detector: PoseTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = torch.full((1, 3, 18, 16, 16), -30.0)
    cells[0, 1, :, 4, 7] = cells[0, 1, :, 4, 8] = 30  # of the second query, who is the surest
    answer = (cells, torch.full((1, 3, 18), -30.0), torch.tensor([[-9.0, 5.0, -9.0]]))
    monkeypatch.setattr(detector, "forward", lambda images: answer)
    found = detector.detect(batch(1))
    # Between columns 7 and 8 of 2x2 pixels: x = 2 * 7.5 + 0.5; row 4: y = 2 * 4 + 0.5.
    torch.testing.assert_close(found.points, torch.tensor([15.5, 8.5]).expand(1, 1, 18, 2))
    torch.testing.assert_close(found.confidence, torch.ones(1, 1, 18))
    assert found.present.all() and found.score.item() == pytest.approx(torch.tensor(5.0).sigmoid().item())


def test_an_image_does_not_depend_on_its_neighbours(detector: PoseTransformer) -> None:
    images = batch()
    alone, together = (detector.detect(x, 2).points for x in (images[1:2], images))
    torch.testing.assert_close(alone[0], together[1], atol=1e-3, rtol=0)


def test_every_query_sees_the_whole_image(detector: PoseTransformer) -> None:
    images = batch(1).requires_grad_()
    cells, absent, _ = detector(images)
    for logit in (cells[0, 0, 0, 0, 0], absent[0, 2, 17]):
        (gradient,) = torch.autograd.grad(logit, images, retain_graph=True)
        assert (gradient[0].abs().amax(0) > 0).all()


def test_stored_and_loaded_twice_is_the_same(detector: PoseTransformer, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path / "one")
    once = PoseTransformer.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert once.config == detector.config and once.threshold == 0.1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"widths": (8, 16)}, r"widths"),
        ({"widths": (8, 16, 12)}, r"widths"),
        ({"people": 0}, "people=0"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"threshold": 1.5}, r"threshold .*1\.5"),
    ],
)
def test_bad_arguments_are_named(change: dict, named: str) -> None:
    settings = {"widths": (8, 8, 8), "encoder_layers": 1, "decoder_layers": 1, "people": 1, "threshold": 0.5}
    with pytest.raises(ValueError, match=named):
        PoseTransformer(**settings | change)


def test_images_of_another_shape_are_refused(detector: PoseTransformer) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8, got \(1, 3, 20, 32\)"):
        detector(torch.zeros(1, 3, 20, 32))
