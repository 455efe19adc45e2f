"""Which diffusers pipelines guidance works on, and what it says of the others."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rg.denoisers import condition_dim, denoiser_name, denoiser_of, is_transformer, tap_channels, taps, time_embed_dim

log = logging.getLogger(__name__)

# What pipelines say of the batch that they give their denoiser.
SAYS = "do_classifier_free_guidance"

# Hooks of diffusers that take weights away, or change them in place, before a backward pass has read them.
MOVING = {
    "group_offloading": "group offloading",
    "lazy_prefetch_group_offloading": "group offloading",
    "layerwise_casting": "layerwise casting",
}


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError when a pipeline's denoiser has no taps, no batch that guidance knows, or no backward pass."""
    name, denoiser = type(pipe).__name__, denoiser_of(pipe)
    taps(denoiser)
    if hasattr(type(pipe), "image_guidance_scale"):
        raise ValueError(f"pipeline: expected at most two branches of classifier-free guidance, {name} has three")
    branches = hasattr(type(pipe), SAYS) or is_transformer(denoiser)
    if not branches or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"pipeline: expected one that makes pictures from text, got a {name}")
    moving = {MOVING[hook] for part in denoiser.modules() for hook in _hook_names(part) if hook in MOVING}
    if moving:
        raise ValueError(
            "pipeline: expected the denoiser's weights to stay in place until the backward pass, "
            f"{' and '.join(moving)} changes them; use enable_model_cpu_offload() or enable_sequential_cpu_offload()"
        )


def _hook_names(module: nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks)


def check_head(head: Any, pipe: Any) -> None:
    """Raises ValueError when a head was made for another model, or is in another precision or place than it must be."""
    if hasattr(head, "check_taps"):
        denoiser = denoiser_of(pipe)
        head.check_taps(tap_channels(denoiser), time_embed_dim(denoiser), condition_dim(denoiser))
    weight = next(head.parameters(), None) if isinstance(head, nn.Module) else None
    if weight is None:
        return
    if weight.dtype != torch.float32:
        raise ValueError(f"head: expected float32 weights, whatever the pipeline's, got {weight.dtype}: head.float()")
    if weight.device.type != pipe._execution_device.type:
        device = pipe._execution_device
        raise ValueError(f"head: expected it on the pipeline's {device}, got {weight.device}: head.to({str(device)!r})")


def check_call(pipe: Any, update: str) -> None:
    """Raises ValueError when a running call has arguments that guidance has no rule for."""
    if getattr(pipe, "guidance_rescale", 0.0) > 0 and update == "score":
        raise ValueError("guidance_rescale: it would rescale the score update too; expected 0.0")
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        raise ValueError(f"pag_scale: expected 0, got {pipe.pag_scale}: perturbed attention adds a third branch")


@contextmanager
def outspoken(pipe: Any) -> Iterator[None]:
    """Makes a pipeline say whether it guides by text. PixArt's have no such property: they tell their encode_prompt."""
    if hasattr(type(pipe), SAYS):
        yield
        return
    encode, names = pipe.encode_prompt, ("encode_prompt", SAYS)
    before = {name: vars(pipe)[name] for name in names if name in vars(pipe)}

    @functools.wraps(encode)
    def encode_prompt(prompt: Any, do_classifier_free_guidance: bool = True, *args: Any, **kwargs: Any) -> Any:
        setattr(pipe, SAYS, do_classifier_free_guidance)
        return encode(prompt, do_classifier_free_guidance, *args, **kwargs)

    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        for name in names:
            vars(pipe).pop(name, None)
        vars(pipe).update(before)


@contextmanager
def uncompiled(pipe: Any) -> Iterator[None]:
    """Runs what contains a tap as plain code: compiled code runs no hooks. Other compiled parts stay compiled."""
    attribute, denoiser = denoiser_name(pipe), denoiser_of(pipe)
    plain = getattr(denoiser, "_orig_mod", denoiser)
    names = {""}
    for name in taps(plain):
        steps = name.split(".")
        names |= {".".join(steps[:depth]) for depth in range(1, len(steps) + 1)}
    parts = {name: plain.get_submodule(name) for name in sorted(names)}
    wrapped = [name for name, part in parts.items() if hasattr(part, "_orig_mod")]
    if wrapped:
        raise ValueError(f"denoiser: expected {wrapped[0]} compiled in place (.compile()), got a torch.compile wrapper")
    calls = {name: part._compiled_call_impl for name, part in parts.items() if part._compiled_call_impl is not None}
    if calls or plain is not denoiser:
        log.warning(
            "compiled code keeps no features: %s run uncompiled while guidance is attached; in a U-Net, "
            "unet.compile_repeated_blocks() compiles the attention blocks, which hold no taps",
            sorted(calls) or "the denoiser",
        )
    try:
        if plain is not denoiser:
            setattr(pipe, attribute, plain)
        for name in calls:
            parts[name]._compiled_call_impl = None
        yield
    finally:
        for name, call in calls.items():
            parts[name]._compiled_call_impl = call
        if plain is not denoiser:
            setattr(pipe, attribute, denoiser)
