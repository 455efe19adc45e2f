import json
from pathlib import Path

import pytest
import torch

from rg.detectors.keypoints import MARGIN, KeypointDetector, PersonDetector
from rg.points import KEYPOINTS, MIRROR

SHIPPED = Path(__file__).parents[3] / "rg/models/detector"


@pytest.fixture
def detector() -> KeypointDetector:
    torch.manual_seed(0)
    return KeypointDetector(widths=(16, 16, 24), finder_widths=(8, 8, 16), threshold=0.02).eval()


def batch(n: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return 2 * torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) - 1


def test_mirror_swaps_left_and_right_only() -> None:
    assert [KEYPOINTS[i] for i in MIRROR[:4]] == ["nose", "neck", "left_shoulder", "left_elbow"]
    assert [MIRROR[i] for i in MIRROR] == list(range(18))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_shapes_and_ranges(detector: KeypointDetector, size: tuple[int, int]) -> None:
    images = batch(3, *size)
    cells, absent = detector(images)
    assert cells.shape == (3, 18, size[0] // 2, size[1] // 2) and absent.shape == (3, 18)
    assert detector.embed(images).shape == (3, 24)
    found = detector.detect(images, 2)
    assert found.points.shape == (3, 2, 18, 2) and found.confidence.shape == (3, 2, 18)
    assert found.score.shape == found.present.shape == (3, 2) and found.present.dtype == torch.bool
    assert (found.confidence >= 0).all() and (found.confidence <= 1).all()
    assert (found.score[:, 0] >= found.score[:, 1]).all() and (found.score >= 0).all() and (found.score <= 1).all()
    assert torch.equal(found.present, found.score >= detector.threshold)


def test_a_map_and_absence_share_one_distribution(detector: KeypointDetector) -> None:
    with torch.no_grad():
        mass = detector.probabilities(batch()).sum((2, 3))
        assert (mass < 1).all()
        detector.absent.bias.fill_(100)
        assert detector.probabilities(batch()).sum((2, 3)).max() < 1e-6
    assert not detector.detect(batch()).present.any()


class SurePose(KeypointDetector):
    """Sees all keypoints half-way between two neighbouring cells, 2 px wide, alone above all others."""

    def forward(self, crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.full((len(crops), 18, 32, 32), -50.0)
        scores[..., 10, 20:22] = 50.0
        # Of the crop and its mirror image, the brighter side tells which one is seen.
        mirrored = (crops[..., :32].mean((1, 2, 3)) > crops[..., 32:].mean((1, 2, 3)))[:, None, None, None]
        return torch.where(mirrored, scores.flip(-1), scores), torch.full((len(crops), 18), -50.0)


class SureFinder(PersonDetector):
    """Sees two people: the box of the second one is the left upper quarter of a 64 px image."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores, boxes = torch.full((1, 16, 16), -50.0), torch.zeros(1, 16, 16, 4)
        scores[0, 8, 8], scores[0, 4, 4] = 50.0, 1.0
        boxes[0, 8, 8] = torch.tensor([31.5, 31.5, 30.0, 64 / MARGIN])
        boxes[0, 4, 4] = torch.tensor([15.5, 15.5, 32 / MARGIN, 10.0])
        return scores, boxes


def test_sure_maps_give_their_places_with_full_confidence() -> None:
    detector = SurePose(widths=(8, 8, 8), finder_widths=(8, 8, 8), threshold=0.9)
    detector.finder = SureFinder(widths=(8, 8, 8))
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    found = detector.detect(image, 2)
    torch.testing.assert_close(found.points[0, 0], torch.tensor([41.5, 20.5]).expand(18, 2))
    # In a crop of half the size a pixel is half as large: (41.5 + 0.5) / 2 - 0.5.
    torch.testing.assert_close(found.points[0, 1], torch.tensor([20.5, 10.0]).expand(18, 2))
    torch.testing.assert_close(found.confidence, torch.ones(1, 2, 18))
    torch.testing.assert_close(found.score, torch.tensor([[1.0, 0.731059]]))
    assert found.present.tolist() == [[True, False]]
    torch.testing.assert_close(detector.detect(image).points, found.points[:, :1])


def test_a_mirrored_image_gives_the_mirrored_pose(detector: KeypointDetector) -> None:
    images = batch()
    with torch.no_grad():
        straight, mirrored = detector.probabilities(images), detector.probabilities(images.flip(-1))
    torch.testing.assert_close(mirrored, straight[:, list(MIRROR)].flip(-1))


def test_an_image_does_not_depend_on_its_neighbours(detector: KeypointDetector) -> None:
    images = batch()
    alone, together = (detector.detect(x, 2).points for x in (images[1:2], images))
    torch.testing.assert_close(alone, together[1:2], atol=1e-3, rtol=0)


def test_stored_and_loaded_twice_is_the_same(detector: KeypointDetector, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path / "one")
    once = KeypointDetector.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    twice = KeypointDetector.from_pretrained(tmp_path / "two")
    assert once.config == detector.config and not once.training
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    torch.testing.assert_close(once(batch())[0], detector(batch())[0], atol=1e-2, rtol=1e-2)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]


def test_bad_input_is_refused(detector: KeypointDetector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16.*\(1, 3, 60, 64\)"):
        detector.detect(batch(1, 60, 64))
    with pytest.raises(ValueError, match=r"three positive multiples of 8.*\[16, 12, 16\].*widths"):
        KeypointDetector(widths=(16, 12, 16), finder_widths=(8, 8, 8), threshold=0.5)
    with pytest.raises(ValueError, match=r"three positive multiples of 8.*\[8, 8\].*widths"):
        KeypointDetector(widths=(16, 16, 16), finder_widths=(8, 8), threshold=0.5)
    with pytest.raises(ValueError, match=r"threshold.*\[0, 1\].* 1\.5"):
        KeypointDetector(widths=(16, 16, 16), finder_widths=(8, 8, 8), threshold=1.5)
    (tmp_path / "config.json").write_text(
        json.dumps({"widths": [16, 16, 16], "finder_widths": [8, 8, 8], "threshold": 0.5})
    )
    with pytest.raises(FileNotFoundError, match=r"config\.json and model\.safetensors.*no model\.safetensors"):
        KeypointDetector.from_pretrained(tmp_path)


def test_shipped_detector_is_small_and_sees_nobody_in_noise() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size < 2_500_000
    detector = KeypointDetector.from_pretrained(SHIPPED)
    assert not detector.detect(batch(8)).present.any()
    assert not detector.detect(torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, 64, 64)).present.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"threshold": "0.2"}, "threshold: .*number, found '0.2'"),
        ({"threshold": 7}, r"\[0, 1\].*7"),
        ({"widths": [16, 16]}, r"widths.*\[16, 16\]|\[16, 16\].*widths"),
        ({"colour": 1}, "colour: expected one of .*'threshold'.* found 1"),
    ],
)
def test_a_damaged_configuration_is_one_line(detector: KeypointDetector, tmp_path: Path, change, words: str) -> None:
    detector.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"^{path}: .*{words}"):
        KeypointDetector.from_pretrained(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=rf"^{path}: .*found \[\]"):
        KeypointDetector.from_pretrained(tmp_path)


def test_damaged_weights_are_one_line(detector: KeypointDetector, tmp_path: Path) -> None:
    with torch.no_grad():
        detector.maps.bias[0] = torch.nan
    detector.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.safetensors: maps.bias: .*found nan"):
        KeypointDetector.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/model.safetensors: expected safetensors"):
        KeypointDetector.from_pretrained(tmp_path)
