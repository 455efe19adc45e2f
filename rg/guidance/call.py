"""The pipeline's call that a guided step answers: whose it is, and what of its arguments guidance has to know."""

import inspect
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from rg.backbone.denoiser import CFG_FLAG, denoiser_of
from rg.backbone.families import family_of
from rg.points import Size


@dataclass(frozen=True)
class Call:
    """images_per_prompt: how often prompts, and so controls, are repeated, one after the other.

    image_size: (height, width) of the images that come out where the pipeline makes larger ones and cuts their middle
        out (PixArt's resolution binning), else None.
    guidance_scale: of text guidance, as it is now. eta: the share of DDPM's noise that DDIM adds.
    """

    images_per_prompt: int
    image_size: Size | None
    guidance_scale: float = 1.0
    eta: float = 0.0


def running_call(pipe: DiffusionPipeline) -> Call:
    """The call of `pipe` from which its denoiser is being called.

    Pipelines that share a denoiser share its hooks: only the stack says whose branches, steps and scheduler these are.

    Raises:
        ValueError: another pipeline calls the denoiser, or none; or twice a step.
    """
    frame = inspect.currentframe()
    while frame is not None:
        # Other frames' variables are left alone: reading them would keep their tensors alive.
        caller = frame.f_locals.get("self") if frame.f_code.co_name == "__call__" else None
        if isinstance(caller, DiffusionPipeline):
            break
        frame = frame.f_back
    if frame is None or caller is not pipe:
        found = "a call from outside it" if frame is None else f"one of {type(caller).__name__} with the same denoiser"
        raise ValueError(f"pipeline: guidance is attached to a {type(pipe).__name__}, got {found}; attach to what runs")
    given = frame.f_locals
    _check_one_call(pipe, given)
    size = (given["orig_height"], given["orig_width"]) if "orig_height" in given else None
    # A callback may have changed it; PixArt's pipelines keep it nowhere else.
    scale = getattr(pipe, "guidance_scale", given.get("guidance_scale"))
    scale = 1.0 if scale is None else float(scale)
    return Call(given.get("num_images_per_prompt") or 1, size, scale, given.get("eta") or 0.0)


def _check_one_call(pipe: DiffusionPipeline, given: dict[str, Any]) -> None:
    """Raises ValueError where text guidance has a call of its own for the negative prompt."""
    never = family_of(denoiser_of(pipe)).branches == "never"
    if not given.get("do_true_cfg") and not (never and getattr(pipe, CFG_FLAG, False)):
        return
    name = "true_cfg_scale" if "true_cfg_scale" in given else "guidance_scale"
    raise ValueError(
        f"{name}: expected 1 or no negative prompt, got {given[name]}: the pipeline then calls its denoiser twice a "
        "step; the modular pipelines may, with a rg.modular.ReadoutGuider"
    )


def check_call(pipe: DiffusionPipeline, update: str, *, moves: str, repeats: bool = False) -> None:
    """Raises ValueError when a running call has arguments that guidance has no rule for."""
    if getattr(pipe, "guidance_rescale", 0.0) > 0 and (moves == "output" or repeats):
        what = f"it would rescale the {update} update too" if moves == "output" else "repeated steps do not know it"
        raise ValueError(f"guidance_rescale: {what}; expected 0.0")
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise ValueError(f"pag_scale: expected 0, got {pipe.pag_scale}: perturbed attention adds a third branch")
