"""Writes pipelines of Stable Diffusion as single files in the authors' layout, which published checkpoints have."""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def save_checkpoint(pipe: DiffusionPipeline, path: Path) -> None:
    """Writes a pipeline of Stable Diffusion 1, 2 (whose text encoder is OpenCLIP's) or SDXL as one file."""
    unet, vae = pipe.unet.state_dict(), pipe.vae.state_dict()
    layers, attends = pipe.unet.config.layers_per_block + 1, {name for name in unet if ".attentions." in name}
    tensors = {"model.diffusion_model." + unet_name(name, layers, attends): value for name, value in unet.items()}
    blocks = len(pipe.vae.config.block_out_channels)
    for name, value in vae.items():
        ours = vae_name(name, blocks)
        square = ".mid.attn_1." in ours and value.ndim == 2
        tensors["first_stage_model." + ours] = value[..., None, None] if square else value
    if hasattr(pipe, "text_encoder_2"):
        tensors |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.text_encoder.config.hidden_size == 12:  # see families.TEXT_WIDTH
        tensors |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        tensors |= clip(pipe.text_encoder, "cond_stage_model.transformer.")
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)


def replace(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}(?=\.)", rf"\g<1>{theirs}", name)
    return name


def unet_name(name: str, layers: int, attends: set[str]) -> str:
    """A U-Net's parameter by the authors' name; blocks have `layers` ResNet blocks going up, one less going down."""
    parts = "resnets|attentions|downsamplers|upsamplers"
    if match := re.fullmatch(rf"(down|up)_blocks\.(\d+)\.({parts})\.(\d+)\.(.*)", name):
        way, block, part, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if part == "downsamplers":
            return f"input_blocks.{(block + 1) * layers}.0.{rest.replace('conv', 'op')}"
        if part == "upsamplers":
            behind = any(other.startswith(f"up_blocks.{block}.attentions.") for other in attends)
            return f"output_blocks.{(block + 1) * layers - 1}.{1 + behind}.{rest}"
        place = block * layers + number + (way == "down")
        stem = f"{'input' if way == 'down' else 'output'}_blocks.{place}.{int(part == 'attentions')}."
        return stem + (replace(rest, RESNET) if part == "resnets" else rest)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{replace(match[3], RESNET) if match[1] == 'resnets' else match[3]}"
    return replace(name, UNET)


def vae_name(name: str, blocks: int) -> str:
    """An autoencoder's parameter by the authors' name; the decoder's blocks are numbered from the finest."""
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.", lambda match: f"up.{blocks - 1 - int(match[1])}.", name)
    name = re.sub(r"up\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2", name)
    name = re.sub(r"up\.(\d+)\.upsamplers\.0", r"up.\1.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        name = replace(name.replace("mid_block.attentions.0.", "mid.attn_1."), ATTENTION)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def clip(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + "text_model." + name.removeprefix("text_model."): v for name, v in encoder.state_dict().items()}


def open_clip(encoder: torch.nn.Module, prefix: str) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    tensors = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
    }
    if "text_projection.weight" in state:
        tensors["text_projection"] = state.pop("text_projection.weight").T
    for name, value in state.items():
        name = replace(name.replace("encoder.layers.", "transformer.resblocks."), OPEN_CLIP)
        if ".q_proj." in name:
            parts = [state[_theirs(name, letter)] for letter in "qkv"]
            name, value = name.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        tensors[name.replace("self_attn", "attn")] = value
    return {prefix + name: value for name, value in tensors.items()}


def _theirs(name: str, letter: str) -> str:
    return name.replace("transformer.resblocks.", "encoder.layers.").replace(".q_proj.", f".{letter}_proj.")
