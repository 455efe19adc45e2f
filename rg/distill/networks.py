"""T2I-Adapters (Mou et al., 2023) and ControlNets (Zhang et al., 2023) for a U-Net, and pipelines that hold one."""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline, T2IAdapter, UNet2DConditionModel
from torch import Tensor, nn

from rg.io.files import read_json
from rg.models import locate

KINDS = ("t2i_adapter", "controlnet")
CLASSES = {"T2IAdapter": T2IAdapter, "ControlNetModel": ControlNetModel}
# (text-to-image pipeline, adapter): the pipeline that takes both.
PIPELINES = {
    ("StableDiffusionPipeline", "T2IAdapter"): "StableDiffusionAdapterPipeline",
    ("StableDiffusionXLPipeline", "T2IAdapter"): "StableDiffusionXLAdapterPipeline",
    ("StableDiffusionPipeline", "ControlNetModel"): "StableDiffusionControlNetPipeline",
    ("StableDiffusionXLPipeline", "ControlNetModel"): "StableDiffusionXLControlNetPipeline",
}


def make_adapter(kind: str, denoiser: nn.Module, *, pixels: int, blocks: int = 1, middle: bool = False) -> nn.Module:
    """A new adapter for a U-Net, in float32: a T2I-Adapter of its widths, or a ControlNet that begins with its weights.

    A U-Net takes an adapter's map behind the downsampling of a level without attention and before that of one with it:
    where its first level has none, as in SDXL and in the embedded model, the adapter is of type full_adapter_xl, whose
    first map is half as large.

    Args:
        kind: one of KINDS.
        pixels: of the image for each latent and axis.
        blocks: residual blocks for each level of a T2I-Adapter.
        middle: give the middle block of a U-Net of three levels a map too, as published adapters for SDXL do.

    Raises:
        ValueError: another kind, a denoiser that is no U-Net, or one whose levels no adapter fits.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
    if not isinstance(denoiser, UNet2DConditionModel):
        raise ValueError(f"adapter: expected a model with a U-Net, found a {type(denoiser).__name__}")
    widths, levels = list(denoiser.config.block_out_channels), denoiser.config.down_block_types
    if kind == "controlnet":
        # One convolution of stride 2 between two widths.
        stages = (16, 32, 96, 256, 512)[: pixels.bit_length()]
        return ControlNetModel.from_unet(denoiser, conditioning_embedding_out_channels=stages).float()
    whole = {"full_adapter": pixels, "full_adapter_xl": 2 * pixels}
    form = "full_adapter_xl" if levels[0] == "DownBlock2D" else "full_adapter"
    if middle and len(widths) == 3:
        widths = [*widths, widths[-1]]
    return T2IAdapter(
        channels=widths, num_res_blocks=blocks, downscale_factor=whole[form], adapter_type=form, in_channels=3
    )


def residuals(adapter: nn.Module, control: Tensor, sample: Tensor, timestep: Tensor, inputs: dict[str, Any]) -> dict:
    """What an adapter adds to a U-Net's call, as arguments of that call, in the dtype of `sample`.

    Args:
        control: images (B, 3, H, W) in [0, 1].
        sample, timestep, inputs: of the call; a T2I-Adapter does not look at them.
    """
    if isinstance(adapter, ControlNetModel):
        given = {name: value.float() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        down, middle = adapter(sample.float(), timestep, controlnet_cond=control, return_dict=False, **given)
        return {
            "down_block_additional_residuals": [part.to(sample) for part in down],
            "mid_block_additional_residual": middle.to(sample),
        }
    return {"down_intrablock_additional_residuals": [part.to(sample) for part in adapter(control)]}


def load_adapter(path: str | Path) -> nn.Module:
    """An adapter that was saved by diffusers, or a shipped one by its name: frozen, in float32.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds neither of the two.
    """
    folder = locate(path, "adapters")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"adapter={path}: expected a folder with config.json and weights, found none")
    name = read_json(folder / "config.json").get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"adapter={path}: _class_name: expected one of {sorted(CLASSES)}, found {name!r}")
    return CLASSES[name].from_pretrained(folder, torch_dtype=torch.float32).eval().requires_grad_(False)


def with_adapter(pipe: DiffusionPipeline, adapter: nn.Module) -> DiffusionPipeline:
    """A pipeline of the same parts that takes a control image with its prompt.

    Raises:
        ValueError: diffusers has none for this pipeline.
    """
    name = PIPELINES.get((type(pipe).__name__, type(adapter).__name__))
    if name is None:
        known = sorted({text for text, _ in PIPELINES})
        raise ValueError(f"adapter: expected a pipeline of {known}, got a {type(pipe).__name__}")
    key = "controlnet" if isinstance(adapter, ControlNetModel) else "adapter"
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind).parameters
    parts: dict[str, Any] = {part: value for part, value in pipe.components.items() if part in taken}
    parts[key] = adapter.to(device=pipe.unet.device, dtype=pipe.unet.dtype)
    if "requires_safety_checker" in taken:
        parts["requires_safety_checker"] = False
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made
