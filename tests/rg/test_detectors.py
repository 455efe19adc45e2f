import json
from pathlib import Path

import pytest
import torch

from rg.detectors import MIRROR, KeypointDetector
from rg.points import KEYPOINTS

SHIPPED = Path(__file__).parents[2] / "rg/models/detector"


@pytest.fixture
def detector() -> KeypointDetector:
    torch.manual_seed(0)
    return KeypointDetector(widths=(16, 16, 24), threshold=0.02).eval()


def pictures(n: int = 3, height: int = 64, width: int = 64) -> torch.Tensor:
    return 2 * torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) - 1


def test_mirror_swaps_left_and_right_only() -> None:
    assert [KEYPOINTS[i] for i in MIRROR[:4]] == ["nose", "neck", "left_shoulder", "left_elbow"]
    assert [MIRROR[i] for i in MIRROR] == list(range(18))


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_shapes_and_ranges(detector: KeypointDetector, size: tuple[int, int]) -> None:
    images = pictures(3, *size)
    cells, absent = detector(images)
    assert cells.shape == (3, 18, size[0] // 2, size[1] // 2) and absent.shape == (3, 18)
    found = detector.detect(images)
    assert found.points.shape == (3, 18, 2) and found.confidence.shape == (3, 18)
    assert found.present.shape == (3,) and found.present.dtype == torch.bool
    assert (found.points >= -0.5).all() and (found.points <= torch.tensor(size[::-1]) - 0.5).all()
    assert (found.confidence >= 0).all() and (found.confidence <= 1).all()
    assert detector.embed(images).shape == (3, 24)


def test_a_map_and_absence_share_one_distribution(detector: KeypointDetector) -> None:
    with torch.no_grad():
        mass = detector.probabilities(pictures()).sum((2, 3))
        assert (mass < 1).all()
        detector.absent.bias.fill_(100)
        assert detector.probabilities(pictures()).sum((2, 3)).max() < 1e-6
    assert not detector.detect(pictures()).present.any()


def test_a_sure_map_gives_its_place_with_full_confidence(detector: KeypointDetector) -> None:
    # Two neighbouring cells of equal score, alone above all others: the keypoint lies half-way, cells are 2 px wide.
    scores = torch.full((1, 18, 32, 32), -50.0)
    scores[..., 10, 20:22] = 50.0

    class Sure(KeypointDetector):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            # Of the picture and its mirror image, the brighter side tells which one is seen.
            mirrored = images[..., :32].mean() > images[..., 32:].mean()
            return scores.flip(-1) if mirrored else scores, torch.full((1, 18), -50.0)

    image = torch.full((1, 3, 64, 64), -1.0)
    image[..., 32:] = 1
    found = Sure(widths=(8, 8, 8), threshold=0.5).detect(image)
    torch.testing.assert_close(found.points, torch.tensor([41.5, 20.5]).expand(1, 18, 2))
    torch.testing.assert_close(found.confidence, torch.ones(1, 18))
    assert found.present.all()


def test_a_mirrored_picture_gives_the_mirrored_pose(detector: KeypointDetector) -> None:
    images = pictures()
    with torch.no_grad():
        straight, mirrored = detector.probabilities(images), detector.probabilities(images.flip(-1))
    torch.testing.assert_close(mirrored, straight[:, list(MIRROR)].flip(-1))


def test_a_picture_does_not_depend_on_its_neighbours(detector: KeypointDetector) -> None:
    images = pictures()
    torch.testing.assert_close(detector.detect(images[1:2]).points, detector.detect(images).points[1:2])


def test_stored_and_loaded_twice_is_the_same(detector: KeypointDetector, tmp_path: Path) -> None:
    detector.save_pretrained(tmp_path / "one")
    once = KeypointDetector.from_pretrained(tmp_path / "one")
    once.save_pretrained(tmp_path / "two")
    twice = KeypointDetector.from_pretrained(tmp_path / "two")
    assert once.widths == detector.widths and once.threshold == detector.threshold and not once.training
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))
    torch.testing.assert_close(once(pictures())[0], detector(pictures())[0], atol=1e-2, rtol=1e-2)
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["config.json", "model.safetensors"]


def test_bad_input_is_refused(detector: KeypointDetector, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiples of 16"):
        detector.detect(pictures(1, 60, 64))
    with pytest.raises(ValueError, match="`widths`"):
        KeypointDetector(widths=(16, 12, 16), threshold=0.5)
    with pytest.raises(ValueError, match="`threshold`"):
        KeypointDetector(widths=(16, 16, 16), threshold=1.5)
    (tmp_path / "config.json").write_text(json.dumps({"widths": [16, 16, 16], "threshold": 0.5}))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        KeypointDetector.from_pretrained(tmp_path)


def test_shipped_detector_is_small_and_sees_nobody_in_noise() -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size < 2_000_000
    detector = KeypointDetector.from_pretrained(SHIPPED)
    assert not detector.detect(pictures(8)).present.any()
    assert not detector.detect(torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, 64, 64)).present.any()
