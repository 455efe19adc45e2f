"""Trains the U-Net and the text encoder of the embedded model on the latents of its autoencoder."""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Generator, Tensor
from transformers import CLIPTokenizer

from data_prep.marionette import VOCABULARY
from experiments.judge_pictures import to_bytes
from experiments.marionette.denoiser import Denoiser, loss_of, make_scheduler, tokenize
from experiments.marionette.files import Outcome, fingerprint, is_done, write_note
from experiments.marionette.reconstruction import write_grid
from experiments.marionette.tokenizer import make_tokenizer
from experiments.marionette.trainer import Trainer

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
    """Writes two rows of pictures of the prompts, from noise that is the same at every call."""
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
    """What `denoiser.loss_of` draws from."""
    latents = torch.load(autoencoder / "latents.pt", weights_only=True, map_location=device)
    tokens = {"tokens": tokenize(tokenizer, prompts), "empty": tokenize(tokenizer, [""])}
    levels = {"alphas_cumprod": make_scheduler().alphas_cumprod}
    return latents | {name: value.to(device) for name, value in (tokens | levels).items()}


def train_denoiser(
    prompts: list[str], autoencoder: Path, settings: dict[str, Any], folder: Path, deadline: float
) -> Outcome:
    """Trains on the latents in the folder of the autoencoder's training; if not done yet, the same call continues.

    In the end folder/model is the whole pipeline, in float32.
    """
    tokenizer = make_tokenizer(VOCABULARY, settings["tokens"])
    words = hashlib.sha256(repr(tokenizer(list(VOCABULARY)).input_ids).encode()).hexdigest()[:16]
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
