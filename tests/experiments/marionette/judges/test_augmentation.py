import torch

from experiments.marionette.judges.data import compose, degrade, is_mirrored, jitter, warp


def matrices(seed: int, count: int = 16) -> torch.Tensor:
    return jitter(count, torch.Generator().manual_seed(seed), turn=0.2, zoom=0.15, shift=0.1)


def test_keypoints_stay_on_their_pixels() -> None:
    """A bright dot drawn at each keypoint is found where its keypoint went."""
    keypoints = torch.zeros(16, 1, 18, 3)
    # A pair of sides whose dots differ, so that a mirrored image must swap them.
    keypoints[:, 0, 2, :2], keypoints[:, 0, 5, :2] = torch.tensor([20.0, 30.0]), torch.tensor([44.0, 38.0])
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.full((16, 3, 64, 64), -0.7)
    for channel, k in enumerate((2, 5)):
        x, y = keypoints[0, 0, k, :2]
        images[:, channel] += 1.4 * torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 8)
    changes = matrices(0)
    moved, points = warp(images, keypoints, changes, 64)
    for image, now, mirrored in zip(moved, points[:, 0], is_mirrored(changes), strict=True):
        weight = (image - image.median()).clamp_min(0.5) - 0.5
        centres = torch.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], -1)[:2]
        centres = centres / weight[:2].sum((1, 2))[:, None]
        assert (centres - now[[5, 2] if mirrored else [2, 5], :2]).norm(dim=-1).max() < 0.5
    assert 0 < is_mirrored(changes).sum() < 16


def test_composed_is_one_after_the_other() -> None:
    images, keypoints = torch.zeros(16, 1, 32, 32), torch.rand(16, 2, 18, 3) * 32
    outer, inner = matrices(1), matrices(2)
    _, at_once = warp(images, keypoints, compose(outer, inner), 32)
    _, first = warp(images, keypoints, outer, 32)
    _, then = warp(images, first, inner, 32)
    torch.testing.assert_close(at_once, then, atol=1e-3, rtol=1e-3)


def test_degraded_images_stay_in_range_and_repeat() -> None:
    images = 2 * torch.rand(4, 3, 16, 16) - 1
    arguments = {"blur": 1.0, "light": 0.2, "offset": 0.1, "noise": 0.1}
    one, again = (degrade(images, torch.Generator().manual_seed(3), **arguments) for _ in range(2))
    assert torch.equal(one, again) and one.abs().max() <= 1 and not torch.allclose(one, images, atol=0.05)
    torch.testing.assert_close(degrade(images, torch.Generator(), **dict.fromkeys(arguments, 0.0)), images)
