"""The authors' schedule of calls with our heads and taps, to be measured against.

The reference image is a row of every batch beside the edited one, both branches are read and differentiated through a
checkpoint around the whole U-Net, x_t moves by one Adam step, and all rows are predicted again: 12 forwards and 4
backwards per guided step and edited image. Their head runs after the upsampling, on maps that are all resized and
kept; ours does not, so that this costs less than theirs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rg.backbone.conditions import Condition, encode_condition
from rg.backbone.features import predict
from rg.heads.base import ReadoutHead
from rg.heads.protocol import time_embedding

# Energy (B,) of the edited images' readouts, given those of the references.
Compare = Callable[[Tensor, Tensor], Tensor]


def both_branches(pipe: Any, prompt: str, x: Tensor) -> dict[str, Any]:
    """Arguments of the U-Net for latents x (R, C, h, w) twice: under the empty prompt, then under `prompt`."""
    empty, given = encode_condition(pipe, ""), encode_condition(pipe, prompt)
    rows, size = len(x), (x.shape[-2] * pipe.vae_scale_factor, x.shape[-1] * pipe.vae_scale_factor)
    text = torch.cat([empty.text.expand(rows, -1, -1), given.text.expand(rows, -1, -1)])
    pooled = None
    if given.pooled is not None:
        pooled = torch.cat([empty.pooled.expand(rows, -1), given.pooled.expand(rows, -1)])
    return Condition(text, pooled).inputs(2 * rows, size, x)


def released_gradient(
    pipe: Any, x: Tensor, timestep: Tensor, inputs: dict[str, Any], head: ReadoutHead, compare: Compare
) -> Tensor:
    """Gradient of the energy of both branches at x (2n, C, h, w), n references and n edited images, in float32."""
    images = len(x) // 2

    def features_of(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(predict(pipe.unet, torch.cat([x, x]), timestep, **inputs).features)

    x = x.detach().requires_grad_()
    span = x.detach()[images:].float().flatten(1)
    span = span.amax(1) - span.amin(1)
    factor = 1.0 if head.readout_span is None else (span / head.readout_span) ** 2
    with torch.enable_grad():
        features = checkpoint(features_of, x, use_reentrant=True)
        time = time_embedding(head, pipe.unet, timestep.expand(images), pipe.scheduler.config.num_train_timesteps)
        energies = []
        for branch in (slice(0, 2 * images), slice(2 * images, None)):
            maps = [feature[branch].float() for feature in features]
            reference = head([each[:images].detach() for each in maps], time)
            readout = head([each[images:] for each in maps], time)
            energies.append((factor * compare(readout, reference)).sum())
        sum(energies).backward()
    return x.grad.float()


@torch.no_grad()
def sample_as_released(
    pipe: Any,
    latents: Tensor,
    prompt: str,
    *,
    head: ReadoutHead,
    compare: Compare,
    num_inference_steps: int,
    guidance_scale: float,
    learning_rate: float = 2e-2,
) -> Tensor:
    """DDIM (eta 0) from latents (2n, C, h, w), n references and n edited images, every step guided: final latents.

    The U-Net's parameters must be frozen.
    """
    pipe.scheduler.set_timesteps(num_inference_steps, device=latents.device)
    inputs, x = both_branches(pipe, prompt, latents), latents
    for timestep in pipe.scheduler.timesteps:
        gradient = released_gradient(pipe, x, timestep, inputs, head, compare)
        x = (x - learning_rate * gradient / (gradient.abs() + 1e-8)).to(x)  # a fresh Adam's first step
        output = pipe.unet(torch.cat([x, x]), timestep, return_dict=False, **inputs)[0]
        empty, given = output.chunk(2)
        x = pipe.scheduler.step(empty + guidance_scale * (given - empty), timestep, x, return_dict=False)[0]
    return x
