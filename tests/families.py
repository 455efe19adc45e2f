"""Tiny pipelines with random weights of every family that guidance works on, and how each of them is called.

Images are 32x32, latents (4, 8, 8). Blocks, conditions and prediction types are those of the real models, widths are
not: the text embeddings are 8, 12 and 16 wide in Stable Diffusion 1, 2 and SDXL, 10 in PixArt and SANA, 18 in Stable
Diffusion 3, 14 in Flux.
"""

import string
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rg.guidance.guidance import ReadoutGuidance

# family: (diffusers' pipeline class, model, input channels of its denoiser)
FAMILIES: dict[str, tuple[str, str, int]] = {
    "sd15": ("StableDiffusionPipeline", "sd15", 4),
    "sd21": ("StableDiffusionPipeline", "sd21", 4),
    "sdxl": ("StableDiffusionXLPipeline", "sdxl", 4),
    "sd15_controlnet": ("StableDiffusionControlNetPipeline", "sd15", 4),
    "sdxl_controlnet": ("StableDiffusionXLControlNetPipeline", "sdxl", 4),
    "sd15_adapter": ("StableDiffusionAdapterPipeline", "sd15", 4),
    "sdxl_adapter": ("StableDiffusionXLAdapterPipeline", "sdxl", 4),
    "sd15_img2img": ("StableDiffusionImg2ImgPipeline", "sd15", 4),
    "sdxl_img2img": ("StableDiffusionXLImg2ImgPipeline", "sdxl", 4),
    "sd15_inpaint": ("StableDiffusionInpaintPipeline", "sd15", 9),
    "sd15_inpaint_plain": ("StableDiffusionInpaintPipeline", "sd15", 4),
    "sdxl_inpaint": ("StableDiffusionXLInpaintPipeline", "sdxl", 9),
    "pixart": ("PixArtSigmaPipeline", "pixart", 4),
    "pixart_alpha": ("PixArtAlphaPipeline", "pixart", 4),
    "sd3": ("StableDiffusion3Pipeline", "sd3", 4),
    "sd35": ("StableDiffusion3Pipeline", "sd3", 4),
    "sana": ("SanaPipeline", "sana", 4),
    "flux": ("FluxPipeline", "flux", 4),
    "flux_schnell": ("FluxPipeline", "flux", 4),
}
MODELS = ("sd15", "sd21", "sdxl", "pixart")
# Of flow matching.
FLOW_MODELS = ("sd3", "sana", "flux")
FAST = ("sd15", "sdxl_controlnet", "pixart", *FLOW_MODELS)


def is_flow(family: str) -> bool:
    """Whether a family's denoiser is a flow-matching one."""
    return FAMILIES[family][1] in FLOW_MODELS


def mostly_slow(families: Iterable[str], fast: tuple[str, ...] = FAST) -> list[Any]:
    """Families as parameters of a test that is slow for all but a few of them."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in families]


TEXT_WIDTH = {"sd15": 8, "sd21": 12, "sdxl": 8}


def make_schedule(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's noise levels."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )


def build(
    family: str,
    tokenizer: CLIPTokenizer,
    *,
    scheduler: type[SchedulerMixin] | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DiffusionPipeline:
    """A tiny pipeline of a family in eval mode; equal seeds give equal weights, and the random state outside stays.

    Args:
        scheduler: None is DDIM, or flow matching's Euler.
        prediction_type: None is that of the real models.
    """
    kind, model, channels = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = TRANSFORMERS[model](family, tokenizer) if model in TRANSFORMERS else _parts(model, channels, tokenizer)
        if "controlnet" in family:
            parts["controlnet"] = _controlnet(parts["unet"])
        if "adapter" in family:
            size = {"downscale_factor": 8, "adapter_type": "full_adapter_xl"} if model == "sdxl" else {}
            parts["adapter"] = T2IAdapter(channels=[8, 16], num_res_blocks=1, **{"downscale_factor": 4} | size)
    schedule: SchedulerMixin = make_schedule(prediction_type or ("v_prediction" if model == "sd21" else "epsilon"))
    if model in FLOW_MODELS:
        schedule = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=family == "flux")
    if model in ("sd15", "sd21"):
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind)(**parts, scheduler=(scheduler or type(schedule)).from_config(schedule.config))
    if dtype != torch.float32:
        pipe.to(dtype)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _parts(model: str, channels: int, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    cross, plain, xl = "CrossAttn{}Block2D", "{}Block2D", model == "sdxl"
    # Attention on the finest level in Stable Diffusion, on the coarse ones in SDXL.
    levels = (plain, cross) if xl else (cross, plain)
    unet = {
        "sample_size": 8,
        "in_channels": channels,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": tuple(level.format("Down") for level in levels),
        "up_block_types": tuple(level.format("Up") for level in reversed(levels)),
        "norm_num_groups": 4,
        "cross_attention_dim": 16 if xl else TEXT_WIDTH[model],
        "attention_head_dim": 2,
        "use_linear_projection": model != "sd15",
    }
    if xl:
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 8,
            "transformer_layers_per_block": (1, 2),
        }
    parts = {
        "unet": UNet2DConditionModel(**unet),
        "vae": _autoencoder(),
        "text_encoder": CLIPTextModel(_text_config(tokenizer, TEXT_WIDTH[model])),
        "tokenizer": tokenizer,
    }
    if xl:
        parts["text_encoder_2"] = CLIPTextModelWithProjection(_text_config(tokenizer, 8))
        parts["tokenizer_2"] = tokenizer
    return parts


def _pixart_parts(family: str, _tokenizer: CLIPTokenizer) -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        # The pipeline of PixArt-alpha gives the size as a condition to models of this sample size.
        sample_size=128 if family == "pixart_alpha" else 8,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=10,
    )
    text_encoder, tokenizer = _t5(10)
    return {
        "transformer": transformer,
        "vae": _autoencoder(),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
    }


def _sd3_parts(family: str, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if family == "sd35" else {}
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        joint_attention_dim=18,
        caption_projection_dim=24,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
        **newer,
    )
    text_encoder_3, tokenizer_3 = _t5(18)
    return {
        "transformer": transformer,
        "vae": _autoencoder(shift_factor=0.5),
        "text_encoder": CLIPTextModelWithProjection(_text_config(tokenizer, 8)),
        "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(tokenizer, 8)),
        "tokenizer_2": tokenizer,
        "text_encoder_3": text_encoder_3,
        "tokenizer_3": tokenizer_3,
    }


def _sana_parts(_family: str, _tokenizer: CLIPTokenizer) -> dict[str, Any]:
    transformer = SanaTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=10,
    )
    _, tokenizer = _t5(10)
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=10,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
    sides = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    sides |= {"block_types": "ResBlock"}
    blocks = {f"{side}_{key}": value for key, value in sides.items() for side in ("encoder", "decoder")}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.4,
        **blocks,
    )
    return {"transformer": transformer, "vae": vae, "text_encoder": Gemma2Model(text), "tokenizer": tokenizer}


def _flux_parts(family: str, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        joint_attention_dim=14,
        pooled_projection_dim=8,
        guidance_embeds=family == "flux",
        axes_dims_rope=(4, 4, 4),
    )
    text_encoder_2, tokenizer_2 = _t5(14)
    return {
        "transformer": transformer,
        "vae": _autoencoder(shift_factor=0.5),
        "text_encoder": CLIPTextModel(_text_config(tokenizer, 8)),
        "tokenizer": tokenizer,
        "text_encoder_2": text_encoder_2,
        "tokenizer_2": tokenizer_2,
    }


# model: what makes a transformer's parts of a family's name and the tokenizer of CLIP
TRANSFORMERS = {"pixart": _pixart_parts, "sd3": _sd3_parts, "sana": _sana_parts, "flux": _flux_parts}


def _t5(width: int) -> tuple[T5EncoderModel, T5Tokenizer]:
    letters = [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters], extra_ids=0)
    text = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(text), tokenizer


def _autoencoder(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        **settings,
        sample_size=32,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    )


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        nn.init.normal_(layer.weight, std=0.3)  # they start as zeros: the control would say nothing
    return net


def arguments(family: str, images: int, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    """What a family's call takes beside the prompts: images of the given (height, width), made of noise."""
    generator = torch.Generator().manual_seed(9)
    noise = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(noise.numpy())
    mask = Image.new("L", size[::-1])
    mask.paste(255, (8, 8, 24, 24))
    height, width = {"height": size[0], "width": size[1]}, {}
    if "pixart" in family:
        # Its tables of aspect ratios begin at latents of 32x32.
        return {**height, "use_resolution_binning": False}
    if family == "sana":
        return {**height, "use_resolution_binning": False, "complex_human_instruction": None}
    if "inpaint" in family:
        # The image is repeated by the pipelines themselves.
        width = {"image": image, "mask_image": mask, "strength": 0.99 if "plain" in family else 1.0}
    elif "img2img" in family:
        return {"image": [image] * images, "strength": 0.8}
    elif "controlnet" in family or "adapter" in family:
        width = {"image": [image] * images}
    return {**height, **width}


def denoise(
    pipe: DiffusionPipeline,
    family: str,
    guidance: ReadoutGuidance | None = None,
    *,
    images: int = 2,
    steps: int = 4,
    size: tuple[int, int] = (32, 32),
    **changes: Any,
) -> Tensor:
    """Final latents (images, 4, h, w) of different prompts, the same generators at every call, at least float32."""
    prompts = ["a person in a red shirt", "grass at dusk", "a person in a blue shirt on sand"][:images]
    given = {
        "prompt": prompts,
        "guidance_scale": 2.0,
        "num_inference_steps": steps,
        "generator": [torch.Generator().manual_seed(i) for i in range(images)],
        "output_type": "latent",
        **arguments(family, images, size),
    }
    given |= changes
    packed = FAMILIES[family][1] == "flux"
    if packed and "latents" in given:
        given["latents"] = pipe._pack_latents(given["latents"], *given["latents"].shape)
    with guidance.attach(pipe) if guidance is not None else nullcontext():
        latents = pipe(**given).images
    if packed and given["output_type"] == "latent":
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    return latents.to(torch.promote_types(latents.dtype, torch.float32))
