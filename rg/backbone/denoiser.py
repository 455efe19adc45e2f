"""What differs between the denoisers that guidance knows: where they lie, their taps, their embeddings.

U-Nets of Stable Diffusion: a tap is the output of `conv2` of a decoder ResNet block, before the residual is added (Luo
et al., 2024, section 3.1). PixArt's transformer (Chen et al., 2024): the output of a block, whose tokens are patches of
the latents, laid out as a map.
"""

import inspect

import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, StableDiffusionPanoramaPipeline
from torch import Tensor, nn


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The attribute of a pipeline that holds its denoiser: "unet" or "transformer".

    Raises:
        ValueError: it has neither a U-Net nor PixArt's transformer.
    """
    if isinstance(getattr(pipe, "unet", None), nn.Module):
        return "unet"
    if is_transformer(getattr(pipe, "transformer", None)):
        return "transformer"
    others = [key for key, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)]
    raise ValueError(
        "pipeline: expected a U-Net as pipe.unet (Stable Diffusion 1, 2, SDXL) or PixArt's transformer as "
        f"pipe.transformer, got a {type(pipe).__name__} of {others}"
    )


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """A pipeline's denoiser; raises ValueError as `denoiser_name` does."""
    return getattr(pipe, denoiser_name(pipe))


def is_transformer(denoiser: object) -> bool:
    """Whether a denoiser, compiled or not, is PixArt's transformer."""
    return isinstance(getattr(denoiser, "_orig_mod", denoiser), PixArtTransformer2DModel)


def taps(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Names and modules of the taps in the order in which they run, in a U-Net from coarse to fine.

    Raises:
        ValueError: the denoiser is neither PixArt's transformer nor has decoder ResNet blocks to tap.
    """
    if is_transformer(denoiser):
        return {f"transformer_blocks.{i}": block for i, block in enumerate(denoiser.transformer_blocks)}
    found = {
        f"up_blocks.{i}.resnets.{j}.conv2": resnet.conv2
        for i, block in enumerate(getattr(denoiser, "up_blocks", ()))
        for j, resnet in enumerate(getattr(block, "resnets", ()))
    }
    if not found:
        raise ValueError(
            "no readout taps: expected a U-Net with up_blocks[i].resnets[j].conv2 or PixArt's transformer, got "
            f"{type(denoiser).__name__}"
        )
    return found


def tap_channels(denoiser: nn.Module) -> list[int]:
    """Channels of the taps, in their order."""
    if is_transformer(denoiser):
        return [denoiser.inner_dim] * len(denoiser.transformer_blocks)
    # The layer under an adapter such as LoRA's, which hides its sizes.
    return [getattr(tap, "base_layer", tap).out_channels for tap in taps(denoiser).values()]


def _time_layers(denoiser: nn.Module) -> tuple[nn.Module, nn.Module]:
    """What makes sinusoids of time, and what embeds them."""
    if is_transformer(denoiser):
        return denoiser.adaln_single.emb.time_proj, denoiser.adaln_single.emb.timestep_embedder
    return denoiser.time_proj, denoiser.time_embedding


def time_embed_dim(denoiser: nn.Module) -> int:
    """Width of the denoiser's time embedding."""
    last = _time_layers(denoiser)[1].linear_2
    return getattr(last, "base_layer", last).out_features


def embed_time(denoiser: nn.Module, index: Tensor) -> Tensor:
    """The denoiser's own embedding of time indices (B,): (B, E), without gradient."""
    sinusoids, embedding = _time_layers(denoiser)
    with torch.no_grad():
        return embedding(sinusoids(index).to(next(embedding.parameters()).dtype))


def condition_dim(denoiser: nn.Module) -> int:
    """Width of the text embeddings: 768 in Stable Diffusion 1, 1024 in 2, 2048 in SDXL, 4096 in PixArt."""
    return getattr(denoiser.config, "caption_channels", None) or denoiser.config.cross_attention_dim


def latent_channels(denoiser: nn.Module) -> int:
    """Channels of the latent itself: inpainting adds input channels behind it, learned variance output channels."""
    return min(denoiser.config.in_channels, denoiser.config.out_channels or denoiser.config.in_channels)


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
    branches = hasattr(type(pipe), CFG_FLAG) or is_transformer(denoiser)
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
