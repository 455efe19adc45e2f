"""A pipeline's denoiser, whatever its family: where it lies, its taps, its embeddings, and whether it can be guided."""

import inspect

import torch
from diffusers import DiffusionPipeline, StableDiffusionPanoramaPipeline
from torch import Tensor, nn

from rg.backbone.families import NAMES, family_of, transformer_family


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The attribute of a pipeline that holds its denoiser: "unet" or "transformer".

    Raises:
        ValueError: it has neither a U-Net nor a transformer that guidance knows.
    """
    if isinstance(getattr(pipe, "unet", None), nn.Module):
        return "unet"
    if transformer_family(getattr(pipe, "transformer", None)) is not None:
        return "transformer"
    others = [key for key, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)]
    raise ValueError(f"pipeline: expected {NAMES}, got a {type(pipe).__name__} of {others}")


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """A pipeline's denoiser; raises ValueError as `denoiser_name` does."""
    return getattr(pipe, denoiser_name(pipe))


def taps(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Names and modules of the taps in the order in which they run, in a U-Net from coarse to fine.

    Raises:
        ValueError: the denoiser is neither a transformer that guidance knows nor has decoder ResNet blocks to tap.
    """
    found = family_of(denoiser).taps()
    if not found:
        raise ValueError(
            f"no readout taps: expected up_blocks[i].resnets[j].conv2, or {NAMES}, got {type(denoiser).__name__}"
        )
    return found


def tap_channels(denoiser: nn.Module) -> list[int]:
    """Channels of the taps, in their order."""
    return family_of(denoiser).tap_channels()


def time_embed_dim(denoiser: nn.Module) -> int:
    """Width of the denoiser's time embedding."""
    last = family_of(denoiser).time_layers()[1].linear_2
    return getattr(last, "base_layer", last).out_features


def embed_time(denoiser: nn.Module, index: Tensor) -> Tensor:
    """The denoiser's own embedding of time indices (B,): (B, E), without gradient."""
    sinusoids, embedding = family_of(denoiser).time_layers()
    with torch.no_grad():
        return embedding(sinusoids(index).to(next(embedding.parameters()).dtype))


def condition_dim(denoiser: nn.Module) -> int:
    """Width of the text embeddings: 768 in Stable Diffusion 1, 1024 in 2, 2048 in SDXL, 4096 in PixArt."""
    return family_of(denoiser).condition_dim()


def latent_channels(denoiser: nn.Module) -> int:
    """Channels of the latent itself, whatever inpainting or a learned variance adds."""
    return family_of(denoiser).latent_channels()


# What pipelines say of the batch that they give their denoiser.
CFG_FLAG = "do_classifier_free_guidance"
# Hooks of diffusers that take weights away, or change them in place, before a backward pass has read them.
UNSUPPORTED_HOOKS = {
    "group_offloading": "group offloading",
    "lazy_prefetch_group_offloading": "group offloading",
    "layerwise_casting": "layerwise casting",
}


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """Raises ValueError when a pipeline's denoiser has no taps, no batch that guidance knows, or no backward pass."""
    name, denoiser = type(pipe).__name__, denoiser_of(pipe)
    taps(denoiser)
    if hasattr(type(pipe), "image_guidance_scale"):
        raise ValueError(f"pipeline: expected at most two branches of classifier-free guidance, {name} has three")
    branches = hasattr(type(pipe), CFG_FLAG) or family_of(denoiser).branches != "pipeline"
    if not branches or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"pipeline: expected one that makes images from text, got a {name}")
    calls = [vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    if not any("num_images_per_prompt" in inspect.signature(call).parameters for call in calls):
        raise ValueError(f"pipeline: expected a batch of images, num_images_per_prompt of each text, got a {name}")
    if isinstance(pipe, StableDiffusionPanoramaPipeline):
        raise ValueError(f"pipeline: expected one call of the denoiser per step, {name} has one per window")
    hooks = {hook for part in denoiser.modules() for hook in _hook_names(part)}
    moving = sorted({UNSUPPORTED_HOOKS[hook] for hook in hooks & UNSUPPORTED_HOOKS.keys()})
    if moving:
        raise ValueError(
            "pipeline: expected the denoiser's weights to stay in place until the backward pass, "
            f"{' and '.join(moving)} changes them; use enable_model_cpu_offload() or enable_sequential_cpu_offload()"
        )


def _hook_names(module: nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks)
