"""Tiny modular pipelines with random weights: how they are built, and called with embeddings instead of prompts."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    ModularPipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tests.families import build

# kind: diffusers' blocks
BLOCKS = {
    "sdxl": "StableDiffusionXLAutoBlocks",
    "sd3": "StableDiffusion3AutoBlocks",
    "flux2": "Flux2KleinBaseAutoBlocks",
    "qwen": "QwenImageAutoBlocks",
    "wan": "WanBlocks",
}
WIDTHS = {"sdxl": 16, "sd3": 18, "flux2": 12, "qwen": 14, "wan": 10}


def flux2_transformer(**settings: Any) -> Flux2Transformer2DModel:
    """Flux 2's blocks of two streams and of one, on latents of 4 channels."""
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=WIDTHS["flux2"],
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        **{"guidance_embeds": False} | settings,
    )


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """Latents (4, 8, 8) of images of 32x32."""
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )


def qwen_transformer() -> QwenImageTransformer2DModel:
    """Qwen-Image's blocks, on latents of 4 channels."""
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=WIDTHS["qwen"],
        axes_dims_rope=(4, 6, 6),
    )


def qwen_autoencoder() -> AutoencoderKLQwenImage:
    """Latents (4, 4, 4) of images of 32x32."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def _wan() -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTHS["wan"],
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {"transformer": transformer, "vae": vae, "scheduler": UniPCMultistepScheduler()}


def build_modular(kind: str, tokenizer: CLIPTokenizer, scheduler: Any = None) -> ModularPipeline:
    """A tiny modular pipeline of a kind, without its text encoders and without decoding, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in ("sdxl", "sd3"):
            parts = dict(build(kind, tokenizer).components)
        elif kind == "flux2":
            parts = {"transformer": flux2_transformer(), "vae": flux2_autoencoder()}
        elif kind == "qwen":
            parts = {"transformer": qwen_transformer(), "vae": qwen_autoencoder()}
        else:
            parts = _wan()
    if kind in ("flux2", "qwen"):
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if scheduler is not None:
        parts["scheduler"] = scheduler
    blocks = getattr(diffusers, BLOCKS[kind])()
    for name in ("text_encoder", "decode"):
        blocks.sub_blocks.pop(name, None)
    pipe = blocks.init_pipeline()
    expected = {spec.name for spec in blocks.expected_components}
    pipe.update_components(**{name: part for name, part in parts.items() if name in expected})
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    for block in _loops(pipe.blocks):
        block.set_progress_bar_config(disable=True)
    return pipe


def _loops(blocks: Any) -> list[Any]:
    parts = [part for block in blocks.sub_blocks.values() for part in _loops(block)]
    return [*parts, blocks] if hasattr(blocks, "set_progress_bar_config") else parts


def run_modular(pipe: ModularPipeline, kind: str, steps: int = 4, **changes: Any) -> Tensor:
    """Final latents of two prompts, as the pipeline holds them: the same at every call."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(2, 5, WIDTHS[kind], generator=generator)
    negative = torch.randn(2, 5, WIDTHS[kind], generator=generator)
    given: dict[str, Any] = {"prompt_embeds": words, "negative_prompt_embeds": negative}
    if kind in ("sdxl", "sd3"):
        pooled = {"sdxl": 8, "sd3": 16}[kind]
        given["pooled_prompt_embeds"] = torch.randn(2, pooled, generator=generator)
        given["negative_pooled_prompt_embeds"] = torch.randn(2, pooled, generator=generator)
    if kind == "qwen":
        given["prompt_embeds_mask"] = given["negative_prompt_embeds_mask"] = torch.ones(2, 5, dtype=torch.long)
    given |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
    given |= {"height": 64, "width": 32} if kind == "qwen" else {"height": 48, "width": 32}
    if kind == "wan":
        given |= {"num_frames": 1}
    return pipe(**given | changes, output="latents")
