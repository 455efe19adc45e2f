"""The features of a denoiser's call, and the rows of its arguments."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn

from rg.backbone.denoiser import taps
from rg.backbone.families import TapOutput, family_of

Nested = TypeVar("Nested")


@dataclass(frozen=True)
class Prediction:
    """What one denoiser call gives.

    output: (B, C', h, w), the model's raw output: in the first C channels, as many as latents have, the scheduler's
        prediction type; behind them PixArt predicts a variance.
    features: one (B, C_l, h_l, w_l) per tap, in their order.
    """

    output: Tensor
    features: list[Tensor]


def predict(
    denoiser: nn.Module,
    sample: Tensor,
    timestep: Tensor,
    *,
    forward: Callable[..., Any] | None = None,
    **inputs: Any,
) -> Prediction:
    """One denoiser call that keeps its features; the only such call in training, sampling and evaluation.

    Args:
        sample: (B, C, h, w), the denoiser's input.
        timestep: scalar or (B,), in the scheduler's units.
        forward: what to call instead of the denoiser, from inside a hook on it.
        inputs: the denoiser's other arguments.

    Raises:
        ValueError: the sample is not made of whole patches.
    """
    check_sample(denoiser, sample)
    family, features = family_of(denoiser), list[Tensor]()
    count = token_count(denoiser, sample)

    def keep(_tap: nn.Module, _given: tuple[Any, ...], output: TapOutput) -> None:
        features.append(as_map(family.tokens(output, count), denoiser, sample))

    handles = [tap.register_forward_hook(keep) for tap in taps(denoiser).values()]
    try:
        times = timestep.expand(len(sample))
        call = forward or partial(family.call, denoiser)
        output = call(sample, timestep=times, **{**inputs, "return_dict": False})[0]
    finally:
        # Removed before any backward pass: recomputation of checkpointed blocks would fire them again.
        for handle in handles:
            handle.remove()
    if len(features) != len(handles):
        raise RuntimeError(
            f"denoiser: expected {len(handles)} features from its taps, got {len(features)}: compiled code runs no "
            "hooks; in a U-Net compile the attention blocks alone, with denoiser.compile_repeated_blocks()"
        )
    return Prediction(output, features)


def token_count(denoiser: nn.Module, sample: Tensor) -> int:
    """How many tokens a transformer makes of latents (B, C, h, w)."""
    return sample.shape[-2] * sample.shape[-1] // family_of(denoiser).patch() ** 2


def as_map(output: Tensor, denoiser: nn.Module, sample: Tensor) -> Tensor:
    """What a tap gives of latents `sample` as (B, C, h, w): tokens (B, h * w, C) are patches, row by row."""
    if output.ndim == 4:
        return output
    return output.transpose(1, 2).unflatten(2, (sample.shape[-2] // family_of(denoiser).patch(), -1))


def check_sample(denoiser: nn.Module, sample: Tensor) -> None:
    """Raises ValueError when latents (B, C, h, w) are not made of whole patches."""
    patch = family_of(denoiser).patch()
    if any(side % patch for side in sample.shape[-2:]):
        height, width = sample.shape[-2:]
        raise ValueError(
            f"latents: expected sides that are multiples of the transformer's patches of {patch}, got {height}x{width}"
        )


def select_rows(value: Nested, rows: slice, batch: int) -> Nested:
    """Rows of every tensor in `value` (nested in tuples, lists, dicts) whose first axis is the batch; the rest as is.

    Lists are new lists of clones: a U-Net consumes adapter residuals in place.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: select_rows(item, rows, batch) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(select_rows(item, rows, batch) for item in value)
    if isinstance(value, list):
        taken = [select_rows(item, rows, batch) for item in value]
        return [item.clone() if isinstance(item, Tensor) else item for item in taken]
    return value


def outside_inference_mode(value: Nested) -> Nested:
    """A copy of every tensor in `value` (nested in tuples, lists, dicts) that was made in inference mode; the rest as
    is. Autograd refuses such tensors."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: outside_inference_mode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(outside_inference_mode(item) for item in value)
    return value
