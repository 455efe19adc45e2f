"""DDIM inversion (Song et al., 2021, section 4.3; Dhariwal and Nichol, 2021): from an image to its noise."""

import inspect

import torch
from diffusers import DDIMInverseScheduler, SchedulerMixin
from torch import Tensor
from tqdm import tqdm

from rg.backbone.diffusion import DiffusionBackbone

SPACINGS = ("leading", "trailing")
# Those that solve the same ordinary differential equation without adding noise.
MIRRORED = (
    *("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler"),
)


@torch.no_grad()
def invert(
    backbone: DiffusionBackbone,
    latents: Tensor,
    *,
    num_inference_steps: int,
    prompt: str = "",
    progress: bool = False,
) -> Tensor:
    """Noise from which deterministic DDIM sampling leads back to `latents`.

    Exact as far as the noise prediction is the same at neighbouring steps: the more steps, the closer. Run it with
    `pipe(prompt, latents=noise, guidance_scale=1.0, eta=0.0, num_inference_steps=...)`, where pipe has the backbone's
    scheduler, one of MIRRORED, and as many steps.

    Args:
        latents: (B, C, h, w), scaled, such as the mean that backbone.encode gives of real images.
        prompt: what the images show; text guidance is 1, as the authors invert.

    Returns:
        (B, C, h, w) in the denoiser's dtype, ready to be a pipeline's `latents`.

    Raises:
        ValueError: the number of steps does not fit the schedule, or the pipeline's scheduler would not lead back.
        FloatingPointError: the latents blow up on the way.
    """
    check_mirrored(backbone.pipeline.scheduler)
    if not 1 <= num_inference_steps <= backbone.num_timesteps:
        raise ValueError(f"num_inference_steps: expected 1 to {backbone.num_timesteps}, got {num_inference_steps}")
    # Without the note of which settings are another class's defaults: they would become this one's.
    settings = {key: value for key, value in backbone.pipeline.scheduler.config.items() if not key.startswith("_")}
    scheduler = DDIMInverseScheduler.from_config({**settings, "clip_sample": False})
    scheduler.set_timesteps(num_inference_steps)
    x = latents.to(backbone.device, torch.float32)
    for timestep in tqdm(scheduler.timesteps, desc="inverting", disable=not progress):
        output = backbone.predict(x, timestep.expand(len(x)).to(x.device), prompt).output
        x = scheduler.step(output, int(timestep), x).prev_sample
    if not x.isfinite().all():
        raise FloatingPointError(f"inversion: expected finite noise after {num_inference_steps} steps, got nan or inf")
    return x.to(backbone.denoiser.dtype)


def check_mirrored(scheduler: SchedulerMixin) -> None:
    """Raises ValueError when a scheduler would not lead back from inverted noise."""
    kind, config = type(scheduler), scheduler.config
    if not any(base.__name__ in MIRRORED for base in kind.__mro__):
        raise ValueError(
            f"scheduler: {kind.__name__} does not lead back from inverted noise, expected one of {MIRRORED}"
        )
    # A configuration also holds what another scheduler knew.
    own = inspect.signature(kind.__init__).parameters
    for name in ("clip_sample", "thresholding"):
        if name in own and config[name]:
            raise ValueError(f"scheduler: expected {name}=False, got True: clipped latents are not led back to")
    if "algorithm_type" in own and config.algorithm_type.startswith("sde"):
        raise ValueError(f"scheduler: expected an algorithm_type without noise, got {config.algorithm_type!r}")
    if config.get("timestep_spacing", "leading") not in SPACINGS:
        raise ValueError(f"scheduler: expected timestep_spacing of {SPACINGS}, got {config.timestep_spacing!r}")
