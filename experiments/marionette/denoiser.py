"""The denoiser of the embedded model: a U-Net and a text encoder that learn together from cached latents."""

from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from experiments.marionette.mixed_precision import mixed_precision

EMPTY = 0.15  # share of prompts that are left out, so that guidance by text has something to move away from
SNR_CAP = 5.0


class Denoiser(nn.Module):
    """U-Net and text encoder as one network.

    Args:
        unet: keywords of UNet2DConditionModel beside those that latents and text encoder decide.
        text: keywords of CLIPTextConfig beside those that the tokenizer decides.
        side: of the latents.
    """

    def __init__(self, unet: dict[str, Any], text: dict[str, Any], tokenizer: CLIPTokenizer, side: int) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=side, in_channels=4, out_channels=4, cross_attention_dim=text["hidden_size"], **unet
        )
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=text["hidden_size"],
            **text,
        )
        self.text_encoder = CLIPTextModel(config)

    def forward(self, x_t: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The noise in latents x_t (B, 4, h, w) at timesteps (B,) under prompts of tokens (B, length)."""
        text = self.text_encoder(tokens)[0]
        return self.unet(x_t, timesteps, encoder_hidden_states=text).sample


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """Tokens (N, length) of prompts, padded and cut as the pipeline does."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def draw_timesteps(count: int, levels: int, generator: Generator) -> Tensor:
    """One timestep from each of `count` equal parts of 0..levels, in random order: evenly spread in every batch."""
    order = torch.randperm(count, generator=generator, device=generator.device)
    within = torch.rand(count, generator=generator, device=generator.device)
    return ((order + within) / count * levels).long().clamp_max(levels - 1)


def loss_of(denoiser: Denoiser, generator: Generator, *, data: dict[str, Tensor], batch_size: int) -> Tensor:
    """Squared error of the predicted noise, weighted by min(SNR, 5) / SNR (Hang et al., 2023).

    Args:
        data: mean and spread of the latents (N, 4, h, w), tokens (N, length), empty (1, length): those of the empty
            prompt, and alphas_cumprod (T,).
    """
    draw = {"generator": generator, "device": generator.device}
    rows = torch.randint(len(data["mean"]), (batch_size,), **draw)
    mean, spread = data["mean"][rows], data["spread"][rows]
    latents = mean + spread * torch.randn(mean.shape, **draw)
    noise = torch.randn(mean.shape, **draw)
    left_out = torch.rand(batch_size, 1, **draw) < EMPTY
    tokens = torch.where(left_out, data["empty"], data["tokens"][rows])
    timesteps = draw_timesteps(batch_size, len(data["alphas_cumprod"]), generator)
    abar = data["alphas_cumprod"][timesteps].view(-1, 1, 1, 1)
    with mixed_precision(mean.device):
        predicted = denoiser(abar.sqrt() * latents + (1 - abar).sqrt() * noise, timesteps, tokens)
    error = (predicted.float() - noise).square().mean((1, 2, 3))
    snr = (abar / (1 - abar)).flatten()
    return (snr.clamp_max(SNR_CAP) / snr * error).mean()
