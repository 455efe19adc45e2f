"""The one place that touches diffusers' hooks: the features of a denoiser, and a hook around its forward call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from rg.denoisers import as_map, check_sample, is_transformer, taps

HOOK_NAME = "readout_guidance"
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


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
    denoiser: nn.Module, sample: Tensor, timestep: Tensor, *, forward: Callable[..., Any] | None = None, **inputs: Any
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
    features: list[Tensor] = []
    handles = [tap.register_forward_hook(lambda _m, _i, out: features.append(out)) for tap in taps(denoiser).values()]
    try:
        times = timestep.expand(len(sample))
        output = (forward or denoiser)(sample, timestep=times, **{**inputs, "return_dict": False})[0]
    finally:
        # Removed before any backward pass: recomputation of checkpointed blocks would fire them again.
        for handle in handles:
            handle.remove()
    if len(features) != len(handles):
        raise RuntimeError(
            f"denoiser: expected {len(handles)} features from its taps, got {len(features)}: compiled code runs no "
            "hooks; in a U-Net compile the attention blocks alone, with denoiser.compile_repeated_blocks()"
        )
    return Prediction(output, [as_map(feature, denoiser, sample) for feature in features])


def take_rows(value: Any, rows: slice, batch: int) -> Any:
    """Rows of every tensor in `value` (nested in tuples, lists, dicts) whose first axis is the batch; the rest as is.

    Lists are new lists of clones: a U-Net consumes adapter residuals in place.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: take_rows(item, rows, batch) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(take_rows(item, rows, batch) for item in value)
    if isinstance(value, list):
        taken = [take_rows(item, rows, batch) for item in value]
        return [item.clone() if isinstance(item, Tensor) else item for item in taken]
    return value


class _DenoiserHook(ModelHook):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def new_forward(self, module: nn.Module, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError("a guided denoiser takes keyword arguments after (sample, timestep)")
        return_dict = kwargs.pop("return_dict", True)
        check_sample(module, sample)
        timestep = torch.as_tensor(timestep, device=sample.device)
        if is_transformer(module):
            timestep = timestep.flatten()[0]  # PixArt's pipelines repeat it for every row

        def forward(sample: Tensor, timestep: Tensor, **inputs: Any) -> Any:
            return self.fn_ref.original_forward(sample, timestep=timestep.expand(len(sample)), **inputs)

        output = self.call(forward, sample, timestep, **kwargs)
        if not return_dict:
            return (output,)
        return UNet2DConditionOutput(sample=output)


@contextmanager
def _inside_offload(denoiser: nn.Module) -> Iterator[None]:
    """Lets `forward` be changed beneath accelerate's hook, if there is one.

    Offloading then brings the weights once per call of the pipeline, and what is set here outlasts the end of a
    pipeline's call, where diffusers takes every offload hook off and puts new ones on.
    """
    if not hasattr(denoiser, "_hf_hook"):
        yield
        return
    outer, denoiser.forward = denoiser.forward, denoiser._old_forward
    yield
    denoiser._old_forward, denoiser.forward = denoiser.forward, outer


@contextmanager
def hooked(denoiser: nn.Module, call: Callable[..., Tensor], *, checkpointing: bool = False) -> Iterator[None]:
    """Lets `call(forward, sample, timestep, **inputs) -> output` answer for the denoiser inside the context.

    The denoiser's parameters are frozen meanwhile; on leaving, also by an exception, it is as it was.

    Args:
        checkpointing: recompute activations in the backward pass (less memory, one more forward).

    Raises:
        RuntimeError: the denoiser is guided already.
    """
    had_registry = hasattr(denoiser, "_diffusers_hook")
    if had_registry and denoiser._diffusers_hook.get_hook(HOOK_NAME) is not None:
        raise RuntimeError("guidance is attached to this pipeline already; leave that context first")
    own_forward = denoiser.__dict__.get("_old_forward", denoiser.__dict__.get("forward"))
    # By name: offloading replaces the parameters themselves.
    trainable = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    checkpointed = {m: {k: v for k, v in vars(m).items() if k in CHECKPOINTING} for m in denoiser.modules()}
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    with _inside_offload(denoiser):
        registry.register_hook(_DenoiserHook(call), HOOK_NAME)
    try:
        for name in trainable:
            denoiser.get_parameter(name).requires_grad_(False)
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        yield
    finally:
        with _inside_offload(denoiser):
            registry.remove_hook(HOOK_NAME, recurse=False)
            if own_forward is None:
                denoiser.__dict__.pop("forward", None)
        if not had_registry:
            del denoiser._diffusers_hook
        for name in trainable:
            denoiser.get_parameter(name).requires_grad_(True)
        for module, state in checkpointed.items():
            for name in CHECKPOINTING:
                vars(module).pop(name, None)
            vars(module).update(state)
