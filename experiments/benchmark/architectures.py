"""The worlds' U-Nets from their published configurations: without weights for counting, with random ones for timing.

Sources: unet/config.json of stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0.
"""

import math
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.loading import PRECISIONS
from rg.models import locate

_SD_BLOCKS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {**_SD_BLOCKS, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        **_SD_BLOCKS,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "in_channels": 4,
    "out_channels": 8,
    "use_additional_conditions": False,
}
# The same in all four.
AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# Parameters of the text encoders: the embedded model's, CLIP ViT-L/14, OpenCLIP ViT-H/14 without its last layer,
# ViT-L/14 and OpenCLIP ViT-bigG/14.
TEXT_PARAMETERS = {"marionette": 294_784, "sd15": 123_060_480, "sd21": 340_387_840, "sdxl": 123_060_480 + 694_659_840}
TEXT_PARAMETERS["pixart"] = 4_762_310_656  # T5-XXL
TOKENS = 77
POOL = 1_048_573  # a prime: rows of weights do not repeat


def make_unet(model: str, latent_side: int | None = None) -> UNet2DConditionModel:
    """The U-Net of a world, on the current device (inside `torch.device("meta")`: without weights).

    Args:
        model: one of UNETS, or the folder or name of a shipped model.
        latent_side: another size of latents than the published one; the weights do not depend on it.
    """
    if model in UNETS:
        config: dict[str, Any] = dict(UNETS[model])
    else:
        config = dict(UNet2DConditionModel.load_config(locate(model) / "unet"))
    return UNet2DConditionModel.from_config(config | ({"sample_size": latent_side} if latent_side else {}))


def make_denoiser(model: str) -> nn.Module:
    """The U-Net of a world, or the transformer of PixArt-Sigma, on the current device."""
    return PixArtTransformer2DModel(**PIXART) if model == "pixart" else make_unet(model)


def make_autoencoder(model: str) -> AutoencoderKL:
    """The autoencoder of a world, on the current device."""
    if model in (*UNETS, "pixart"):
        return AutoencoderKL(**AUTOENCODER)
    return AutoencoderKL.from_config(AutoencoderKL.load_config(locate(model) / "vae"))


def count_parameters(module: nn.Module) -> int:
    """Numbers that the module's weights have."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def randomise(module: nn.Module, seed: int) -> None:
    """Fills weights with noise of variance 1 / fan-in, norms with ones and biases with zeros.

    The noise repeats after POOL numbers, and not from row to row: 2.6e9 drawn ones would take a minute.
    """
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(float(name.endswith("weight")))
            continue
        noise = (pool / math.sqrt(parameter[0].numel())).to(parameter)
        parameter.view(-1).copy_(noise.repeat(-(-parameter.numel() // POOL))[: parameter.numel()])


def build_backbone(
    model: str, *, latent_side: int, precision: str = "float32", device: str | None = None, seed: int = 0
) -> DiffusionBackbone:
    """A shipped model, or a published one with random weights and a text encoder of one layer.

    Raises:
        ValueError: a shipped model has another latent side.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model not in UNETS:
        backbone = DiffusionBackbone.from_pretrained(model, device=device, precision=precision)
        if backbone.latent_size[0] != latent_side:
            raise ValueError(f"latent_side: expected {backbone.latent_size[0]} for {model}, got {latent_side}")
        return backbone
    dtype = PRECISIONS[precision]
    with torch.device("meta"):
        unet, vae = make_unet(model, latent_side).to(dtype), make_autoencoder(model)
    for part in (unet, vae):
        part.to_empty(device=device)
        randomise(part, seed)
    pipeline = _pipeline(model, unet, vae).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionBackbone(pipeline)


def _pipeline(model: str, unet: UNet2DConditionModel, vae: AutoencoderKL) -> DiffusionPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(locate("marionette") / "tokenizer", model_max_length=TOKENS)
    schedule = DDIMScheduler.from_pretrained(locate("marionette") / "scheduler")
    width = 768 if model == "sdxl" else UNETS[model]["cross_attention_dim"]
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": vae,
        "scheduler": schedule,
        "tokenizer": tokenizer,
        "text_encoder": CLIPTextModel(_text_config(tokenizer, width)).to(unet.dtype),
    }
    if model == "sdxl":
        second = CLIPTextModelWithProjection(_text_config(tokenizer, 1280)).to(unet.dtype)
        return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **absent)


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
