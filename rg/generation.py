"""Images from a pipeline, guided or not, and the controls that guide them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import refresh_seconds
from rg.guidance.attach import scheduler_step
from rg.guidance.guidance import ReadoutGuidance
from rg.guidance.step import StepTrace
from rg.io.images import open_image
from rg.points import Size
from rg.settings import check_arguments

# Names on the command line, as in the literature.
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
# What a step's trace has of every image.
TRACED = ("energy", "gradient_norm", "delta_norm")
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
        arguments: the pipeline's own, such as num_inference_steps and guidance_scale; one negative_prompt is for all
            images, a list has one for each.

    Raises:
        ValueError: another number of negative prompts than of images.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    if arguments.get("negative_prompt") is not None:
        arguments["negative_prompt"] = per_image("negative_prompt", arguments["negative_prompt"], len(prompts))
    with guidance.attach(pipe) if guidance is not None else nullcontext():
        images = pipe(list(prompts), generator=generators, output_type="pt", **arguments).images
    if isinstance(images, np.ndarray):  # the T2I-Adapter pipeline of Stable Diffusion answers so, whatever is asked for
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.cpu().float() * 2 - 1


def generate_in_batches(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    batch_size: int,
    guide: Callable[[slice], ReadoutGuidance] | None = None,
    **arguments: Any,
) -> tuple[Tensor, list[StepTrace]]:
    """As `generate`, at most `batch_size` images at once; and the trace of all of them, empty where nothing guides.

    Args:
        guide: gives the guidance of the images of a slice.
        arguments: as of `generate`; latents (B, C, h, w) have one for each image.
    """
    images, traces = [], []
    for part, given in _batches({"prompts": list(prompts), "seeds": list(seeds), **arguments}, batch_size):
        guidance = None if guide is None else guide(part)
        images.append(generate(pipe, guidance=guidance, **given))
        traces.append([] if guidance is None else list(guidance.trace))
    return torch.cat(images), join_traces(traces)


def _batches(arguments: Mapping[str, Any], size: int) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Slices of the images, and the arguments of each: what there is one of for each image is cut."""
    count = len(arguments["prompts"])
    texts = {
        name for name, value in arguments.items() if isinstance(value, list) and value and isinstance(value[0], str)
    }
    for name in sorted(texts):
        per_image(name, arguments[name], count)
    for start in range(0, count, size):
        part = slice(start, min(start + size, count))
        cut = {name: arguments[name][part] for name in texts | {"seeds", "latents"} & set(arguments)}
        yield part, {**arguments, **cut}


def join_traces(traces: Sequence[Sequence[StepTrace]]) -> list[StepTrace]:
    """The trace of several batches, made with the same settings, as if they had been one."""
    joined = []
    for steps in zip(*traces, strict=True):
        images = [len(step.energy) for step in steps]
        values = {name: torch.cat([getattr(step, name) for step in steps]) for name in TRACED}
        # Branch by branch the rows of a readout are those of the images.
        readouts = [
            torch.cat([r.unflatten(0, (-1, n)) for r, n in zip(term, images, strict=True)], 1).flatten(0, 1)
            for term in zip(*(step.readouts for step in steps), strict=True)
        ]
        condition = "own" if any(step.condition == "own" for step in steps) else steps[0].condition
        joined.append(replace(steps[0], **values, readouts=readouts, condition=condition))
    return joined


# Gets what is being made, such as "guided", and latents (B, C, h, w) after every step; what it raises ends the run.
Watch = Callable[[str, Tensor], None]


@contextmanager
def watched(pipe: Any, watch: Watch | None, what: str) -> Iterator[None]:
    """Calls `watch(what, latents)` after every step that the pipeline's scheduler takes inside the context.

    The latents are those of the images that the step expects to come out (x0), where the scheduler says so (DDIM,
    DDPM, Euler), else x_{t-1}.
    """
    if watch is None:
        yield
        return

    def answer(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        answered = step(*args, **kwargs)
        values = answered if isinstance(answered, tuple) else answered.to_tuple()
        watch(what, values[-1].detach())
        return answered

    with scheduler_step(pipe.scheduler, answer):
        yield


def show_progress(pipe: Any, what: str) -> None:
    """Gives the pipeline's own progress bar a name, and few refreshes where nobody watches."""
    pipe.set_progress_bar_config(disable=False, desc=what, mininterval=refresh_seconds())


def per_image(name: str, texts: str | Sequence[str], images: int) -> list[str]:
    """One text for each image, of one for all or as many as there are images; raises ValueError for another number."""
    texts = [texts] * images if isinstance(texts, str) else list(texts)
    if len(texts) != images:
        raise ValueError(f"{name}: expected one text, or a list of {images}, one per image, got {len(texts)}: {texts}")
    return texts


def check_sampling(backbone: DiffusionBackbone, sampling: DictConfig) -> dict[str, Any]:
    """The pipeline's own arguments of a command; `image`, such as a ControlNet's, is a file, one for all images.

    Raises:
        ValueError: an argument that the pipeline does not take or of another type, or an image that cannot be read.
    """
    arguments = OmegaConf.to_container(sampling, resolve=True)
    if arguments.get("eta", 0.0) is None:  # of a world whose schedulers add no noise
        del arguments["eta"]
    file = arguments.get("image")
    given = arguments if file is None else arguments | {"image": "???"}  # to be read
    check_arguments(type(backbone.pipeline).__call__, given, "sampling", closed=True)
    if file is not None:
        arguments["image"] = fit_image(open_image(Path(file)), image_size(backbone, arguments))
    return arguments


def image_size(backbone: DiffusionBackbone, sampling: Mapping[str, Any]) -> Size:
    """(height, width) of the images that a pipeline makes: as its arguments say, else the backbone's own."""
    height, width = backbone.resolution
    return sampling.get("height") or height, sampling.get("width") or width


def crop_box(size: Size, target: Size) -> tuple[int, int, int, int]:
    """Left, top, right and bottom, in whole pixels, of the largest centred part of an image of `size` that has the
    shape of `target`; for a square it is data_prep's."""
    height, width = size
    if width * target[0] > height * target[1]:
        width = max(round(height * target[1] / target[0]), 1)
    else:
        height = max(round(width * target[0] / target[1]), 1)
    left, top = (size[1] - width) // 2, (size[0] - height) // 2
    return left, top, left + width, top + height


def fit_image(image: Image.Image, target: Size) -> Image.Image:
    """The centre of an image, resized by area to `target` (height, width), as preparation does with labels."""
    if (image.height, image.width) == target:
        return image
    part = np.asarray(image.crop(crop_box((image.height, image.width), target)))
    return Image.fromarray(cv2.resize(part, target[::-1], interpolation=cv2.INTER_AREA))
