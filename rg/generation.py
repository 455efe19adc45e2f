"""Images from a pipeline, guided or not, and the controls that guide them."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from rg.guidance.guidance import ReadoutGuidance

# Names on the command line, as in the literature.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}
# PNDM as Stable Diffusion runs it: without the Runge-Kutta start, which takes twelve more calls of the model.
SETTINGS = {"pndm": {"skip_prk_steps": True}}


def scheduler_class(name: str) -> type[SchedulerMixin]:
    """The class of a scheduler by its name.

    Raises:
        ValueError: the name is not one of SCHEDULERS.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {sorted(SCHEDULERS)}, got {name!r}")
    return getattr(diffusers, SCHEDULERS[name])


def set_scheduler(pipe: Any, name: str) -> None:
    """Gives a pipeline another scheduler over the same noise schedule; for `name` see `scheduler_class`."""
    pipe.scheduler = scheduler_class(name).from_config(pipe.scheduler.config, **SETTINGS.get(name, {}))


def image_seeds(seed: int, indices: Iterable[int]) -> list[int]:
    """Seeds of the images of a run, by their indices in it; other runs share none with less than a million images."""
    return [seed * 1_000_003 + index for index in indices]


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    guidance: ReadoutGuidance | None = None,
    **arguments: Any,
) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1]. Image i depends on prompts[i] and seeds[i], not on its neighbours.

    Args:
        pipe: any diffusers text-to-image pipeline.
        guidance: steers the sampling; None samples plainly.
        arguments: the pipeline's own, such as num_inference_steps and guidance_scale.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with guidance.attach(pipe) if guidance is not None else nullcontext():
        images = pipe(list(prompts), generator=generators, output_type="pt", **arguments).images
    return images.cpu().float() * 2 - 1
