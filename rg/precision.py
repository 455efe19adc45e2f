"""Gradients through half-precision denoisers, and autoencoders that overflow."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Largest slope at a tap on its way into a float16 backward pass (whose largest number is 65504), the factor by which a
# row that overflows backs off, and how often.
PEAK, BACKOFF, BACKOFFS = 16.0, 2.0**-5, 4


def pull_back(features: list[Tensor], slopes: list[Tensor | None], x: Tensor) -> Tensor:
    """Gradient at x of an energy, given its gradients at the features: J^T slopes, (B, C, h, w) in float32.

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
        gradient = gradient.float() / scale
        bad = ~gradient.flatten(1).isfinite().all(1)
        if not again or not bad.any():
            break
        scale = torch.where(bad.view(-1, 1, 1, 1), scale * BACKOFF, scale)
    return gradient


@contextmanager
def watched(vae: Any) -> Iterator[None]:
    """Makes an autoencoder whose decoder overflows raise FloatingPointError, instead of giving black pictures."""

    def check(_decoder: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if output.isfinite().all():
            return
        if not given[0].isfinite().all():
            raise FloatingPointError("latents: expected finite values to decode, got nan or inf from sampling")
        raise FloatingPointError(
            f"vae: expected finite pictures, its decoder overflows in {output.dtype}: load the pipeline in bfloat16 or "
            "float32, set vae.config.force_upcast where the pipeline heeds it (SDXL), or take an autoencoder made for "
            "half precision"
        )

    decoder = getattr(vae, "decoder", None)
    if decoder is None:
        yield
        return
    handle = decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def keep_float32(vae: nn.Module) -> None:
    """Casts an autoencoder to float32, and whatever enters it: pipelines hand it tensors of the denoiser's dtype."""
    vae.float()

    def cast(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if isinstance(value, Tensor) else value for value in given)

    for name in ("encoder", "post_quant_conv", "decoder"):
        module = getattr(vae, name, None)
        if module is not None:
            module.register_forward_pre_hook(cast)
