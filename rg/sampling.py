"""Pictures from a pipeline, guided or not, and the controls that guide them."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from rg import released
from rg.guidance import ReadoutGuidance
from rg.heads import load_head
from rg.pictures import UNREADABLE, open_picture
from rg.points import KEYPOINTS, Size, rescale
from rg.readout import ReadoutHead

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


def choose_head(choice: DictConfig, family: str) -> ReadoutHead:
    """The head of a command: `head.released`, one of the authors' by name or file, where it is given, else `head.path`,
    which `head.class` reads where that is a class of the user's own.

    Args:
        family: the world's family of backbones, for which a released head is taken.

    Raises:
        FileNotFoundError, ValueError: see rg.released.load and rg.heads.load_head.
    """
    if choice.released is not None:
        return released.load(choice.released, family=family)
    return load_head(choice.path, choice["class"])


def set_scheduler(pipe: Any, name: str) -> None:
    """Gives a pipeline another scheduler over the same noise schedule.

    Raises:
        ValueError: the name is not one of SCHEDULERS.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler: expected one of {sorted(SCHEDULERS)}, got {name!r}")
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config, **SETTINGS.get(name, {}))


def generate(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    guidance: ReadoutGuidance | None = None,
    **arguments: Any,
) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1]. Picture i depends on prompts[i] and seeds[i], not on its neighbours.

    Args:
        pipe: any diffusers text-to-image pipeline.
        guidance: steers the sampling; None samples plainly.
        arguments: the pipeline's own, such as num_inference_steps and guidance_scale.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    with guidance.attach(pipe) if guidance is not None else nullcontext():
        pictures = pipe(list(prompts), generator=generators, output_type="pt", **arguments).images
    return pictures.cpu().float() * 2 - 1


def load_control(path: str | Path, image_size: Size) -> Tensor | Image.Image:
    """A control from a file: a picture as RGB, or keypoints as .json, moved to the image that will be made.

    The JSON holds {"size": [height, width], "keypoints": [people][18][x, y, visible]}, in pixels of that size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the picture cannot be read, or the keypoints have another form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"control={path}: there is no such file")
    if path.suffix != ".json":
        try:
            return open_picture(path)
        except UNREADABLE as error:
            raise ValueError(f"control={path}: expected a picture, found {error!r}") from error
    try:
        record = json.loads(path.read_text())
        keypoints = torch.tensor(record["keypoints"], dtype=torch.float32)
        size = (int(record["size"][0]), int(record["size"][1]))
        if min(size) < 1:
            raise ValueError(f"size {size}")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f'control={path}: expected {{"size": [h, w], "keypoints": [...]}}, found {error!r}') from error
    if keypoints.ndim != 3 or keypoints.shape[1:] != (len(KEYPOINTS), 3):
        raise ValueError(f"control={path}: expected keypoints (people, 18, 3), found {tuple(keypoints.shape)}")
    moved = rescale(keypoints[..., :2], size, image_size)
    return torch.cat([moved, keypoints[..., 2:]], -1)[None]


def save_picture(picture: Tensor, path: Path) -> None:
    """Writes one picture (3, H, W) in [-1, 1] as PNG, under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    temporary = path.with_suffix(".part")
    Image.fromarray(array).save(temporary, format="PNG")
    temporary.replace(path)
