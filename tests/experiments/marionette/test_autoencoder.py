import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from experiments.marionette.autoencoder import (
    encode,
    loss_of,
    make_autoencoder,
    reconstruction_loss,
    slopes,
    train_autoencoder,
)
from experiments.marionette.renders import Renders
from experiments.marionette.trainer import step_generator

CPU = torch.device("cpu")


def test_slopes_are_those_of_a_plane() -> None:
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    along, down = slopes((2 * x - 3 * y).expand(1, 3, 4, 5))
    assert torch.equal(along, torch.full((1, 3, 4, 4), 2.0)) and torch.equal(down, torch.full((1, 3, 3, 5), -3.0))


def test_reconstruction_loss_weighs_its_parts() -> None:
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(reconstruction_loss(images + 0.5, images), torch.tensor(0.25 + 0.5))
    ramp = 0.1 * torch.arange(4.0).expand(2, 3, 4, 4)  # slope 0.1 along x alone, mean 0.15, mean square 0.035
    torch.testing.assert_close(reconstruction_loss(images + ramp, images), torch.tensor(0.035 + 0.15 + 0.5 * 0.1))


def test_latents_begin_with_a_small_deviation() -> None:
    vae = make_autoencoder([8, 8, 8], 64, seed=0)
    mean, std = encode(vae, torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    assert mean.shape == (4, 4, 16, 16)
    torch.testing.assert_close(std, torch.full_like(std, math.exp(-3)), atol=0.02, rtol=0)
    one, same, other = (make_autoencoder([8, 8], 64, seed).encoder.conv_in.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_loss_is_reconstruction_and_divergence() -> None:
    """With known moments the divergence from N(0, 1) is known, and what is decoded has the known deviation."""
    vae, seen = make_autoencoder([8, 8, 8], 64, seed=0).requires_grad_(False), []
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias[:4], vae.quant_conv.bias[4:] = 2.0, -1.0
    vae.decoder.conv_out.weight.zero_()
    vae.decoder.conv_out.bias.fill_(0.25)
    vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.full((3, 3, 64, 64), 255, dtype=torch.uint8)
    plain, weighted = (
        loss_of(vae, step_generator(0, 0, CPU), images=images, batch_size=16, kl_weight=weight) for weight in (0.0, 0.5)
    )
    torch.testing.assert_close(plain, torch.tensor(0.75**2 + 0.75), atol=1e-5, rtol=0)
    divergence = 0.5 * (2.0**2 + math.exp(-1) - 1 + 1)
    torch.testing.assert_close(weighted - plain, torch.tensor(0.5 * divergence), atol=1e-5, rtol=0)
    latents = seen[0].float()
    assert latents.mean().item() == pytest.approx(2, abs=0.02)
    assert latents.std().item() == pytest.approx(math.exp(-0.5), abs=0.02)


def test_pieces_are_one_run_and_end_in_a_model_and_latents(
    images: Renders, settings: dict[str, Any], autoencoder: Path, tmp_path: Path
) -> None:
    arguments = (images, images.image[:4], settings["autoencoder"], tmp_path, 0.0)
    assert [train_autoencoder(*arguments) for _ in range(4)] == ["not done yet"] * 2 + ["done", "done before"]
    for name in ("losses.csv", "quality.json", "model/config.json", "model/diffusion_pytorch_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (autoencoder / name).read_bytes(), name
    latents = torch.load(tmp_path / "latents.pt", weights_only=True)
    expected = torch.load(autoencoder / "latents.pt", weights_only=True)
    assert all(torch.equal(latents[name], expected[name]) for name in ("mean", "spread"))
    # Scaled, a latent that is drawn has a standard deviation of 1; half precision holds the weights.
    drawn = latents["mean"] + latents["spread"] * torch.randn(latents["mean"].shape)
    assert drawn.shape == (8, 4, 16, 16) and drawn.std().item() == pytest.approx(1, abs=0.02)
    vae = AutoencoderKL.from_pretrained(tmp_path / "model")
    scaled = encode(vae, images.image)[0] * vae.config.scaling_factor
    torch.testing.assert_close(scaled, latents["mean"], atol=1e-4, rtol=1e-4)
    weights = load_file(tmp_path / "model/diffusion_pytorch_model.safetensors").values()
    assert all(torch.equal(weight, weight.half().float()) for weight in weights)
    note = json.loads((tmp_path / "quality.json").read_text())
    assert note["settings"]["pictures"] == images.name and 0 < note["psnr_sampled"] < 60


def test_a_seed_decides_and_other_images_are_refused(
    images: Renders, settings: dict[str, Any], autoencoder: Path, tmp_path: Path
) -> None:
    other = settings["autoencoder"] | {"seed": 2, "steps": 1}
    train_autoencoder(images, images.image[:4], other, tmp_path, 0.0)
    first = (autoencoder / "losses.csv").read_text().splitlines()[1]
    assert (tmp_path / "losses.csv").read_text().splitlines()[1] != first
    moved = images._replace(name="another-world")
    with pytest.raises(ValueError, match=f"pictures={images.name}.* pictures=another-world"):
        train_autoencoder(moved, moved.image[:4], other, tmp_path, 0.0)


def test_a_saved_autoencoder_can_be_where_it_starts(
    images: Renders, settings: dict[str, Any], autoencoder: Path, tmp_path: Path
) -> None:
    still = settings["autoencoder"] | {"start": str(autoencoder / "model"), "steps": 1, "learning_rate": 0.0}
    train_autoencoder(images, images.image[:4], still, tmp_path, float("inf"))
    name = "model/diffusion_pytorch_model.safetensors"
    weights, former = (load_file(folder / name) for folder in (tmp_path, autoencoder))
    assert all(torch.equal(weights[key], former[key]) for key in former)
