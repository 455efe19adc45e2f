"""The energy of all terms at one step, and its gradient at the taps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rg.backbone.denoiser import denoiser_of, embed_time
from rg.guidance.targets import ReferenceTarget


@dataclass(frozen=True)
class Energy:
    """value: (rows,), weighted sum of the terms; slopes: its gradient at every tap, None where it is constant, in
    float32; readouts: one per term."""

    value: Tensor
    slopes: list[Tensor | None]
    readouts: list[Tensor]


@dataclass(frozen=True)
class Moment:
    """Where a sampling run is: latents x (rows, C, h, w) of `images` images in one or two branches."""

    pipe: Any
    x: Tensor
    step: int
    timestep: float
    images: int


def measure(
    guidance: Any, pipe: Any, features: list[Tensor], x: Tensor, timestep: Tensor, images: int, step: int
) -> Energy:
    """The energy of `guidance.terms` on the features of rows x (rows, C, h, w), which hold `images` images.

    Heads and their gradient run in float32, whatever the denoiser's dtype, also under autocast.

    Raises:
        ValueError: a control that does not fit, a head without one energy per row.
    """
    leaves = [feature.detach().float().requires_grad_() for feature in features]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        total, readouts = torch.zeros(len(x), device=x.device), []
        for term in guidance.terms:
            readout = term.head(leaves, head_time(term.head, pipe, timestep.expand(len(x))))
            energy = _energy(term, readout, Moment(pipe, x, step, timestep.item(), images))
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


def head_time(head: Any, pipe: Any, times: Tensor) -> Tensor | None:
    """The time embedding (B, E) that a head takes at times (B,), in float32; None where it takes none."""
    if hasattr(head, "time_index"):
        times = head.time_index(times, pipe.scheduler.config.num_train_timesteps)
    return None if times is None else embed_time(denoiser_of(pipe), times).float()


def _energy(term: Any, readout: Tensor, moment: Moment) -> Tensor:
    if term.target is None:
        return readout
    x, rows, images = moment.x, len(moment.x), moment.images
    if isinstance(term.target, ReferenceTarget):
        target = term.target.at(moment.step, moment.timestep, x.device)
        if len(target) != rows // images:
            raise ValueError(f"reference: expected {rows // images} branches as guided, got {len(target)}")
    else:
        factor = moment.pipe.vae_scale_factor
        sizes = {"readout_size": tuple(readout.shape[-2:]), "image_size": (x.shape[-2] * factor, x.shape[-1] * factor)}
        target = term.target.encode(term.head, **sizes, device=x.device)[None]
    if target.shape[1] not in (1, images):
        raise ValueError(f"control: expected 1 or {images} of them, one per image, got {target.shape[1]}")
    target = target.expand(rows // images, images, *target.shape[2:]).flatten(0, 1)
    arguments = {name: _for_rows(value, rows, images, x.device) for name, value in term.arguments.items()}
    return term.head.energy(readout, target, **arguments)


def _for_rows(value: Any, rows: int, images: int, device: torch.device) -> Any:
    """Tensors (B or 1, ...), also in tuples, on the device and one per row."""
    if isinstance(value, tuple):
        return tuple(_for_rows(part, rows, images, device) for part in value)
    if not isinstance(value, Tensor):
        return value
    if len(value) not in (1, images):
        raise ValueError(f"arguments: expected 1 or {images} of them, one per image, got {len(value)}")
    return value.to(device).repeat(rows // len(value), *[1] * (value.ndim - 1))


# Largest slope at a tap on its way into a float16 backward pass (whose largest number is 65504), the factor by which a
# row that overflows backs off, and how often.
PEAK, BACKOFF, BACKOFFS = 16.0, 2.0**-5, 4


def pull_back(features: list[Tensor], slopes: list[Tensor | None], x: Tensor) -> Tensor:
    """Gradient at x of an energy, given its gradients at the features: J^T slopes, (B, C, h, w), at least in float32.

    In float16 small gradients become zero (Micikevicius et al., 2018, section 3.2): there each row's slopes are
    multiplied by a scale of its own, which the result is divided by. Rows do not mix, so a row's gradient does not
    depend on its neighbours. Not finite where even the smallest scale overflows.

    Args:
        features: taps (B, C_l, h_l, w_l) computed from x with gradient.
        slopes: the energy's gradient at each of them in float32, None where it does not depend on it.

    Raises:
        ValueError: the energy does not depend on the features, or they not on x.
    """
    pairs = [(feature, slope) for feature, slope in zip(features, slopes, strict=True) if slope is not None]
    if not pairs:
        raise ValueError("head: expected an energy that depends on the features, got a constant")
    half = any(feature.dtype == torch.float16 for feature, _ in pairs)
    scale = torch.ones(len(x), 1, 1, 1, device=x.device)
    if half:
        peak = torch.stack([slope.flatten(1).abs().amax(1) for _, slope in pairs]).amax(0)
        scale = torch.where(peak > 0, PEAK / peak, 1.0).nan_to_num(1.0, posinf=1.0).view(-1, 1, 1, 1)
    for attempt in range(BACKOFFS + 1):
        again = half and attempt < BACKOFFS
        given = [(slope * scale).to(feature.dtype) for feature, slope in pairs]
        (gradient,) = torch.autograd.grad(
            [feature for feature, _ in pairs], x, given, retain_graph=again, allow_unused=True
        )
        if gradient is None:
            raise ValueError("denoiser: no gradient reaches its input from its taps; a part of it detaches them")
        gradient = gradient / scale  # half precision becomes float32
        bad = ~gradient.flatten(1).isfinite().all(1)
        if not again or not bad.any():
            break
        scale = torch.where(bad.view(-1, 1, 1, 1), scale * BACKOFF, scale)
    return gradient
