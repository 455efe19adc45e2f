import math
from pathlib import Path

import cv2
import pytest
import torch
from diffusers import AutoencoderKL

from experiments.marionette.autoencoder import CHUNK, encode, make_autoencoder, psnr, quality, write_grid


@pytest.fixture
def vae() -> AutoencoderKL:
    return make_autoencoder([8, 8, 8], 64, seed=0).eval().requires_grad_(False)


def test_psnr_is_that_of_the_mean_squared_error() -> None:
    images = torch.rand(2, 3, 4, 4) * 0.2
    errors = torch.tensor([0.1, 0.5]).view(2, 1, 1, 1)
    expected = sum(10 * math.log10(2**2 / error**2) for error in (0.1, 0.5)) / 2
    assert psnr(images + errors, images) == pytest.approx(expected, abs=1e-4)
    # What is out of range is shown at its end: no error there.
    assert psnr(torch.full((1, 3, 4, 4), 1.1), torch.full((1, 3, 4, 4), 0.8)) == pytest.approx(20, abs=1e-4)


def test_quality_of_a_constant_decoder(vae: AutoencoderKL) -> None:
    vae.decoder.conv_out.weight.zero_()
    vae.decoder.conv_out.bias.fill_(0.5)
    levels = torch.tensor([255, 0, 51], dtype=torch.uint8)  # 1, -1, -0.6
    found = quality(vae, levels.view(3, 1, 1, 1).expand(-1, 3, 64, 64))
    expected = sum(10 * math.log10(4 / error**2) for error in (0.5, 1.5, 1.1)) / 3
    assert found == {"psnr_mean": pytest.approx(expected, abs=1e-3), "psnr_sampled": pytest.approx(expected, abs=1e-3)}


def test_quality_of_a_sample_is_less_by_its_noise(vae: AutoencoderKL) -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for log_variance in (-30.0, 2.0):
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0.0, log_variance
        mean, std = encode(vae, images)
        torch.testing.assert_close(std, torch.full_like(mean, math.exp(log_variance / 2)))
        found.append(quality(vae, images))
    assert found[0]["psnr_mean"] == found[1]["psnr_mean"] == pytest.approx(found[0]["psnr_sampled"], abs=1e-3)
    assert found[1]["psnr_sampled"] < found[1]["psnr_mean"] - 0.01


def test_encoding_counts_images_and_keeps_their_order(vae: AutoencoderKL, capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.arange(CHUNK + 3, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    mean, std = encode(vae, images)
    assert mean.shape == std.shape == (CHUNK + 3, 4, 2, 2)
    assert f" {CHUNK + 3}/{CHUNK + 3} " in capsys.readouterr().err
    torch.testing.assert_close(encode(vae, images[-2:])[0], mean[-2:], atol=1e-5, rtol=1e-4)
    assert not capsys.readouterr().err


def test_grid_has_its_rows_one_under_the_other(tmp_path: Path) -> None:
    rows = torch.zeros(2, 3, 3, 4, 5, dtype=torch.uint8)
    rows[1, 2, 0] = 200  # red
    write_grid(tmp_path / "grid.png", *rows)
    grid = cv2.imread(str(tmp_path / "grid.png"))
    assert grid.shape == (16, 30, 3)
    assert (grid[8:, 20:] == [0, 0, 200]).all() and grid.sum() == 200 * 8 * 10
