"""The denoiser of the embedded model: a U-Net and a text encoder that learn together from cached latents."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Generator, Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data_prep.marionette.vocabulary import SIDED_VOCABULARY, VOCABULARY
from experiments.marionette.autoencoder import write_grid
from experiments.marionette.record import Outcome, is_done, write_note
from experiments.marionette.tokenizer import make_tokenizer
from experiments.marionette.trainer import Trainer, mixed_precision
from rg.io.files import fingerprint
from rg.io.images import to_bytes

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
    """One timestep from each of `count` equal parts of 0..levels, in random order: even in every batch."""
    order = torch.randperm(count, generator=generator, device=generator.device)
    within = torch.rand(count, generator=generator, device=generator.device)
    return ((order + within) / count * levels).long().clamp_max(levels - 1)


def loss_of(denoiser: Denoiser, generator: Generator, *, data: dict[str, Tensor], batch_size: int) -> Tensor:
    """Squared error of the predicted noise, weighted by min(SNR, 5) / SNR (Hang et al., 2023).

    Args:
        data: mean and spread (standard deviation) of the latents (N, 4, h, w), tokens (N, length), empty (1, length):
            those of the empty prompt, and alphas_cumprod (T,).
    """
    draw = {"generator": generator, "device": generator.device}
    rows = torch.randint(len(data["mean"]), (batch_size,), **draw)
    mean, std = data["mean"][rows].float(), data["spread"][rows].float()
    latents = mean + std * torch.randn(mean.shape, **draw)
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


PREVIEWED, PREVIEW_STEPS, GUIDANCE_SCALE = 16, 20, 2.0


def make_pipeline(denoiser: Denoiser, tokenizer: CLIPTokenizer, autoencoder: Path) -> StableDiffusionPipeline:
    """An ordinary pipeline around the denoiser and the saved autoencoder."""
    vae = AutoencoderKL.from_pretrained(autoencoder, local_files_only=True)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(denoiser.unet.device)


def preview(denoiser: Denoiser, path: Path, *, tokenizer: CLIPTokenizer, autoencoder: Path, prompts: list[str]) -> None:
    """Writes two rows of images of the prompts, from noise that is the same at every call."""
    pipeline = make_pipeline(denoiser, tokenizer, autoencoder)
    generators = [Generator().manual_seed(index) for index in range(len(prompts))]
    made = pipeline(
        prompts,
        num_inference_steps=PREVIEW_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        generator=generators,
        output_type="pt",
    ).images
    write_grid(path, *to_bytes(made.cpu() * 2 - 1).split(max(1, len(prompts) // 2)))


def load_data(tokenizer: CLIPTokenizer, autoencoder: Path, prompts: list[str], device: str) -> dict[str, Tensor]:
    """What `loss_of` draws from, latents in half precision."""
    latents = torch.load(autoencoder / "latents.pt", weights_only=True, map_location=device)
    latents = {name: value.half() for name, value in latents.items()}
    tokens = {"tokens": tokenize(tokenizer, prompts), "empty": tokenize(tokenizer, [""])}
    levels = {"alphas_cumprod": make_scheduler().alphas_cumprod}
    return latents | {name: value.to(device) for name, value in (tokens | levels).items()}


def know_words(settings: dict[str, Any]) -> tuple[CLIPTokenizer, str]:
    """The tokenizer of a training, and sixteen hexadecimal digits that change with the tokens of any of its words."""
    vocabulary = SIDED_VOCABULARY if settings["sided"] else VOCABULARY
    tokenizer = make_tokenizer(vocabulary, settings["tokens"])
    return tokenizer, hashlib.sha256(repr(tokenizer(list(vocabulary)).input_ids).encode()).hexdigest()[:16]


def train_denoiser(
    prompts: list[str], autoencoder: Path, settings: dict[str, Any], folder: Path, deadline: float
) -> Outcome:
    """Trains on the latents in the folder of the autoencoder's training; if not done yet, the same call continues.

    In the end folder/model is the whole pipeline, in float32.
    """
    tokenizer, words = know_words(settings)
    identity = settings | {"autoencoder": fingerprint(autoencoder / "model"), "words": words}
    done = folder / "done.json"
    if is_done(done, identity):
        return "done before"
    done.unlink(missing_ok=True)
    data = load_data(tokenizer, autoencoder, prompts, settings["device"])
    torch.manual_seed(settings["seed"])
    network = Denoiser(settings["unet"], settings["text"], tokenizer, data["mean"].shape[-1]).to(settings["device"])
    if settings["device"] == "cpu":  # the backward pass of fused attention is slow there
        network.unet.set_attn_processor(AttnProcessor())
    loss = partial(loss_of, data=data, batch_size=settings["batch_size"])
    trainer = Trainer(network, loss, identity, folder)
    show = partial(preview, tokenizer=tokenizer, autoencoder=autoencoder / "model", prompts=prompts[:PREVIEWED])
    if not trainer.run(deadline, show):
        return "not done yet"
    trainer.average.unet.set_attn_processor(AttnProcessor2_0())
    make_pipeline(trainer.average, tokenizer, autoencoder / "model").save_pretrained(folder / "model")
    write_note(done, identity, {})
    return "done"


def load_average(checkpoints: Sequence[Path], autoencoder: Path) -> tuple[StableDiffusionPipeline, list[int]]:
    """The pipeline of a training under way, in float32, and the steps of its checkpoints.

    Args:
        checkpoints: one or more of one training; the mean of their averaged weights is taken.
        autoencoder: the folder of the saved model whose latents they were trained on.

    Raises:
        ValueError: a checkpoint of other settings, of another autoencoder or of other words.
    """
    states = [torch.load(path, weights_only=True, mmap=True, map_location="cpu") for path in checkpoints]
    settings = states[0]["settings"]
    tokenizer, words = know_words(settings)
    expected = settings | {"autoencoder": fingerprint(autoencoder), "words": words}
    for path, state in zip(checkpoints, states, strict=True):
        other = [name for name, value in expected.items() if state["settings"].get(name) != value]
        if other:
            was, now = (", ".join(f"{name}={of.get(name)}" for name in other) for of in (expected, state["settings"]))
            raise ValueError(f"expected {path} to be made with {was}, got {now}")
    vae = AutoencoderKL.load_config(autoencoder, local_files_only=True)
    side = vae["sample_size"] // 2 ** (len(vae["block_out_channels"]) - 1)
    denoiser = Denoiser(settings["unet"], settings["text"], tokenizer, side)
    averages = [state["average"] for state in states]
    denoiser.load_state_dict(
        {
            name: torch.stack([average[name].double() for average in averages]).mean(0).to(value.dtype)
            for name, value in averages[0].items()
        }
    )
    return make_pipeline(denoiser.eval(), tokenizer, autoencoder), [state["step"] for state in states]
