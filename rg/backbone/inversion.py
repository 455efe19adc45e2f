"""DDIM inversion (Song et al., 2021, section 4.3; Dhariwal and Nichol, 2021): from an image to its noise."""

import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor
from tqdm import tqdm

from rg.backbone.diffusion import DiffusionBackbone

SPACINGS = ("leading", "trailing")


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
    DDIMScheduler and as many steps.

    Args:
        latents: (B, C, h, w), scaled, such as the mean that backbone.encode gives of real images.
        prompt: what the images show; text guidance is 1, as the authors invert.

    Returns:
        (B, C, h, w) in the denoiser's dtype, ready to be a pipeline's `latents`.

    Raises:
        ValueError: the number of steps does not fit the schedule, or its spacing has no inverse.
        FloatingPointError: the latents blow up on the way.
    """
    config = backbone.pipeline.scheduler.config
    if config.get("timestep_spacing", "leading") not in SPACINGS:
        raise ValueError(f"scheduler: expected timestep_spacing of {SPACINGS}, got {config.timestep_spacing!r}")
    if not 1 <= num_inference_steps <= backbone.num_timesteps:
        raise ValueError(f"num_inference_steps: expected 1 to {backbone.num_timesteps}, got {num_inference_steps}")
    scheduler = DDIMInverseScheduler.from_config(config)
    scheduler.set_timesteps(num_inference_steps)
    x = latents.to(backbone.device, torch.float32)
    for timestep in tqdm(scheduler.timesteps, desc="inverting", disable=not progress):
        output = backbone.predict(x, timestep.expand(len(x)).to(x.device), prompt).output
        x = scheduler.step(output, int(timestep), x).prev_sample
    if not x.isfinite().all():
        raise FloatingPointError(f"inversion: expected finite noise after {num_inference_steps} steps, got nan or inf")
    return x.to(backbone.denoiser.dtype)
