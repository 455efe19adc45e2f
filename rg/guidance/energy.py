"""The energy of all terms at one step, and its gradient at the latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from rg.guidance.targets import ReferenceTarget
from rg.heads.protocol import time_embedding
from rg.points import Size

if TYPE_CHECKING:
    from rg.guidance.guidance import GuidanceTerm

# A tensor, a tuple of them, or a plain value.
Argument = TypeVar("Argument")


@dataclass(frozen=True)
class Reading:
    """One denoiser call and what is to be known of it, for rows of `images` images in one or two branches.

    x: (rows, C', h, w), what the denoiser was given, the leaf of the features' graph; latent: its first C channels,
        those of latents, without gradient.
    output: (rows, C'', h, w), what it predicted, without gradient.
    features: one (rows, C_l, h_l, w_l) per tap.
    timestep: scalar, in the scheduler's units, of num_timesteps. step: of the sampling run, from 0.
    image_size: (height, width) of the image being made.
    rows: which of the pipeline's batch these are. shared: whether under the pipeline's own condition.
    shown_size: of the image that comes out, where that is cut out of the one being made, else None.
    images_per_prompt: how many images in a row have one prompt.
    """

    x: Tensor
    latent: Tensor
    output: Tensor
    features: list[Tensor]
    timestep: Tensor
    step: int
    images: int
    image_size: Size
    denoiser: nn.Module
    num_timesteps: int
    rows: slice
    shared: bool
    shown_size: Size | None = None
    images_per_prompt: int = 1


@dataclass(frozen=True)
class Energy:
    """value: (rows,), weighted sum of the terms; feature_gradients: its gradient at every tap, None where it is
    constant, in float32; readouts: one per term."""

    value: Tensor
    feature_gradients: list[Tensor | None]
    readouts: list[Tensor]


def energy_and_gradient(
    terms: "Sequence[GuidanceTerm]", reading: Reading, *, range_factor: bool = False
) -> tuple[Energy, Tensor]:
    """The energy of a reading and its gradient at the latents, summed over branches: (images, C, h, w), in float32.

    The graph of the reading is gone when this returns.

    Args:
        range_factor: multiply energies by ((max x_t - min x_t) / readout span)^2, as the authors' code does.

    Raises:
        FloatingPointError: the energy or its gradient is not finite.
        ValueError: see `compute_energy` and `gradient_at`.
    """
    energy = compute_energy(terms, reading, range_factor=range_factor)
    _check_finite("energy", energy.value, reading)
    gradient = gradient_at(reading.x, reading.features, energy.feature_gradients)[:, : reading.latent.shape[1]]
    gradient = gradient.unflatten(0, (-1, reading.images)).sum(0)
    _check_finite("gradient", gradient, reading)
    return energy, gradient


def energy_and_feature_gradients(
    terms: "Sequence[GuidanceTerm]", reading: Reading, *, range_factor: bool = False
) -> tuple[Energy, list[Tensor | None]]:
    """The energy of a reading and its gradient at every tap, summed over branches: (images, C_l, h_l, w_l) in float32,
    None where it does not depend on it. Nothing passes back through the denoiser.

    Args:
        range_factor: as of `energy_and_gradient`.

    Raises:
        FloatingPointError, ValueError: as `energy_and_gradient`.
    """
    energy = compute_energy(terms, reading, range_factor=range_factor)
    _check_finite("energy", energy.value, reading)
    if all(gradient is None for gradient in energy.feature_gradients):
        raise ValueError("head: expected an energy that depends on the features, got a constant")
    gradients = [
        None if gradient is None else gradient.unflatten(0, (-1, reading.images)).sum(0)
        for gradient in energy.feature_gradients
    ]
    for gradient in gradients:
        if gradient is not None:
            _check_finite("gradient", gradient, reading)
    return energy, gradients


def compute_energy(terms: "Sequence[GuidanceTerm]", reading: Reading, *, range_factor: bool = False) -> Energy:
    """The weighted energy of all terms, row by row.

    Heads and their gradient run in float32, whatever the denoiser's dtype, also under autocast.

    Raises:
        ValueError: a control that does not fit, a head without one energy per row.
    """
    leaves, rows = [feature.detach().float().requires_grad_() for feature in reading.features], len(reading.x)
    with torch.enable_grad(), torch.autocast(reading.x.device.type, enabled=False):
        total, found = torch.zeros(rows, device=reading.x.device), []
        for term in terms:
            readout = term.head(leaves, _time(term, reading))
            energy = _energy(term, readout, reading)
            if range_factor and term.head.readout_span is not None:
                latent = reading.latent.float().flatten(1)
                energy = energy * ((latent.amax(1) - latent.amin(1)) / term.head.readout_span) ** 2
            if energy.shape != total.shape:
                raise ValueError(f"head: expected one energy per row, {tuple(total.shape)}, got {tuple(energy.shape)}")
            total = total + term.weight * energy
            found.append(readout.detach())
        gradients: list[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            gradients = list(torch.autograd.grad(total.sum(), leaves, allow_unused=True))
    return Energy(total.detach(), gradients, found)


@torch.no_grad()
def readouts(terms: "Sequence[GuidanceTerm]", reading: Reading) -> list[Tensor]:
    """What every term's head reads, in float32 and without gradient."""
    features = [feature.float() for feature in reading.features]
    return [term.head(features, _time(term, reading)) for term in terms]


def _time(term: "GuidanceTerm", reading: Reading) -> Tensor | None:
    return time_embedding(term.head, reading.denoiser, reading.timestep.expand(len(reading.x)), reading.num_timesteps)


def _energy(term: "GuidanceTerm", readout: Tensor, reading: Reading) -> Tensor:
    if term.target is None:
        return readout
    rows, images, device = len(reading.x), reading.images, reading.x.device
    if isinstance(term.target, ReferenceTarget):
        target = term.target.at(reading.step, reading.timestep.item(), device)
        if len(target) != rows // images:
            raise ValueError(f"reference: expected {rows // images} branches as guided, got {len(target)}")
    else:
        target = term.target.encode(
            term.head,
            readout_size=tuple(readout.shape[-2:]),
            image_size=reading.image_size,
            shown_size=reading.shown_size,
            device=device,
        )[None]
    target = torch.stack([_for_images("control", branch, reading) for branch in target])
    target = target.expand(rows // images, images, *target.shape[2:]).flatten(0, 1)
    arguments = {name: _for_rows(value, reading) for name, value in term.arguments.items()}
    return term.head.energy(readout, target, **arguments)


def _for_images(name: str, value: Tensor, reading: Reading) -> Tensor:
    """What is given for all images, one per image or one per prompt, for all images alike or one per image.

    Raises:
        ValueError: it is another number.
    """
    images, each = reading.images, reading.images_per_prompt
    if len(value) in (1, images):
        return value
    if len(value) * each != images:
        per_prompt = f", or {images // each}, one per prompt" if each > 1 else ""
        raise ValueError(f"{name}: expected 1 or {images} of them, one per image{per_prompt}, got {len(value)}")
    return value.repeat_interleave(each, dim=0)


def _for_rows(value: Argument, reading: Reading) -> Argument:
    """Tensors (B, P or 1, ...), also in tuples, on the device and one per row; B images of P prompts."""
    if isinstance(value, tuple):
        return tuple(_for_rows(part, reading) for part in value)
    if not isinstance(value, Tensor):
        return value
    value = _for_images("arguments", value.to(reading.x.device), reading)
    return value.repeat(len(reading.x) // len(value), *[1] * (value.ndim - 1))


def _check_finite(name: str, value: Tensor, reading: Reading) -> None:
    bad = [row for row, part in enumerate(value.isfinite()) if not part.all()]
    if bad:
        where = f"guidance step {reading.step} (t={reading.timestep.item():g})"
        raise FloatingPointError(f"{where}: {name} is not finite for rows {bad}")


# Largest gradient at a tap on its way into a float16 backward pass (whose largest number is 65504), the factor by which
# a row that overflows backs off, and how often.
PEAK, BACKOFF, BACKOFFS = 16.0, 2.0**-5, 4


def gradient_at(x: Tensor, features: list[Tensor], feature_gradients: list[Tensor | None]) -> Tensor:
    """Gradient at x of an energy, given those at the features (a vector-Jacobian product): (B, C, h, w), in float32 at
    least.

    In float16 small gradients become zero (Micikevicius et al., 2018, section 3.2): there each row's are multiplied by
    a scale of its own, which the result is divided by. Rows do not mix, so a row's gradient does not depend on its
    neighbours. Not finite where even the smallest scale overflows.

    Args:
        x: (B, C, h, w), a leaf. features: taps (B, C_l, h_l, w_l) computed from it with gradient.
        feature_gradients: the energy's at each of them in float32, None where it does not depend on it.

    Raises:
        ValueError: the energy does not depend on the features, or they not on x.
    """
    pairs = [(feature, g) for feature, g in zip(features, feature_gradients, strict=True) if g is not None]
    if not pairs:
        raise ValueError("head: expected an energy that depends on the features, got a constant")
    half = any(feature.dtype == torch.float16 for feature, _ in pairs)
    scale = torch.ones(len(x), 1, 1, 1, device=x.device)
    if half:
        peak = torch.stack([g.flatten(1).abs().amax(1) for _, g in pairs]).amax(0)
        scale = torch.where(peak > 0, PEAK / peak, 1.0).nan_to_num(1.0, posinf=1.0).view(-1, 1, 1, 1)
    for attempt in range(BACKOFFS + 1):
        again = half and attempt < BACKOFFS
        given = [(g * scale).to(feature.dtype) for feature, g in pairs]
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
