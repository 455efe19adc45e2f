"""The energy of all terms at one step, and its gradient at the taps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rg.hooks import embed_time


@dataclass(frozen=True)
class Energy:
    """value: (rows,), weighted sum of the terms; slopes: its gradient at every tap, None where it is constant, in
    float32; readouts: one per term."""

    value: Tensor
    slopes: list[Tensor | None]
    readouts: list[Tensor]


def measure(guidance: Any, pipe: Any, features: list[Tensor], x: Tensor, timestep: Tensor, images: int) -> Energy:
    """The energy of `guidance.terms` on the features of rows x (rows, C, h, w), which hold `images` images.

    Heads and their gradient run in float32, whatever the denoiser's dtype, also under autocast.

    Raises:
        ValueError: a control that does not fit, a head without one energy per row.
    """
    leaves = [feature.detach().float().requires_grad_() for feature in features]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        total, readouts = torch.zeros(len(x), device=x.device), []
        for term in guidance.terms:
            readout = term.head(leaves, _time_embedding(term.head, pipe, timestep.expand(len(x))))
            energy = _energy(term, readout, pipe, x, images)
            span = getattr(term.head, "readout_span", 1.0)
            if guidance.latent_range_factor and span is not None:
                latent = x.detach().float().flatten(1)
                energy = energy * ((latent.amax(1) - latent.amin(1)) / span) ** 2
            if energy.shape != total.shape:
                raise ValueError(f"head: expected one energy per row, {tuple(total.shape)}, got {tuple(energy.shape)}")
            total = total + term.weight * energy
            readouts.append(readout.detach())
        slopes: list[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            slopes = list(torch.autograd.grad(total.sum(), leaves, allow_unused=True))
    return Energy(total.detach(), slopes, readouts)


def _time_embedding(head: Any, pipe: Any, times: Tensor) -> Tensor | None:
    if hasattr(head, "time_index"):
        times = head.time_index(times, pipe.scheduler.config.num_train_timesteps)
    return None if times is None else embed_time(pipe.unet, times).float()


def _energy(term: Any, readout: Tensor, pipe: Any, x: Tensor, images: int) -> Tensor:
    if term.target is None:
        return readout
    image_size = (x.shape[-2] * pipe.vae_scale_factor, x.shape[-1] * pipe.vae_scale_factor)
    size = (readout.shape[-2], readout.shape[-1])
    target = term.target.encode(term.head, readout_size=size, image_size=image_size, device=x.device)
    if len(target) not in (1, images):
        raise ValueError(f"control: expected 1 or {images} of them, one per image, got {len(target)}")
    return term.head.energy(readout, target.repeat(len(x) // len(target), 1, 1, 1))
