"""Which diffusers pipelines guidance works on, and what it says of the others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rg.hooks import condition_dim, tap_channels, taps, time_embed_dim

log = logging.getLogger(__name__)

# Hooks of diffusers that take weights away, or change them in place, before a backward pass has read them.
MOVING = {
    "group_offloading": "group offloading",
    "lazy_prefetch_group_offloading": "group offloading",
    "layerwise_casting": "layerwise casting",
}


def check_pipeline(pipe: Any) -> None:
    """Raises ValueError when a pipeline's denoiser has no taps, no batch that guidance knows, or no backward pass."""
    name, unet = type(pipe).__name__, getattr(pipe, "unet", None)
    if not isinstance(unet, nn.Module):
        others = [key for key, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)]
        raise ValueError(f"pipeline: expected one with a U-Net as pipe.unet, got a {name} of {others}")
    taps(unet)
    if not hasattr(type(pipe), "do_classifier_free_guidance") or not hasattr(pipe, "encode_prompt"):
        raise ValueError(f"pipeline: expected one that makes pictures from text, got a {name}")
    if hasattr(type(pipe), "image_guidance_scale"):
        raise ValueError(f"pipeline: expected at most two branches of classifier-free guidance, {name} has three")
    moving = {MOVING[hook] for part in unet.modules() for hook in _hook_names(part) if hook in MOVING}
    if moving:
        raise ValueError(
            f"pipeline: expected the U-Net's weights to stay in place until the backward pass, {' and '.join(moving)} "
            "changes them; use enable_model_cpu_offload() or enable_sequential_cpu_offload()"
        )


def _hook_names(module: nn.Module) -> list[str]:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks)


def check_head(head: Any, pipe: Any) -> None:
    """Raises ValueError when a head was made for another model, or is in another precision or place than it must be."""
    if hasattr(head, "check_taps"):
        head.check_taps(tap_channels(pipe.unet), time_embed_dim(pipe.unet), condition_dim(pipe.unet))
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
def uncompiled(pipe: Any) -> Iterator[None]:
    """Runs what contains a tap as plain code: compiled code runs no hooks. Other compiled parts stay compiled."""
    unet, plain = pipe.unet, getattr(pipe.unet, "_orig_mod", pipe.unet)
    names = {""}
    for name in taps(plain):
        steps = name.split(".")
        names |= {".".join(steps[:depth]) for depth in range(1, len(steps) + 1)}
    parts = {name: plain.get_submodule(name) for name in sorted(names)}
    wrapped = [name for name, part in parts.items() if hasattr(part, "_orig_mod")]
    if wrapped:
        raise ValueError(f"denoiser: expected {wrapped[0]} compiled in place (.compile()), got a torch.compile wrapper")
    calls = {name: part._compiled_call_impl for name, part in parts.items() if part._compiled_call_impl is not None}
    if calls or plain is not unet:
        log.warning(
            "compiled code keeps no features: %s run uncompiled while guidance is attached; "
            "unet.compile_repeated_blocks() compiles the attention blocks, which hold no taps",
            sorted(calls) or "the U-Net",
        )
    try:
        if plain is not unet:
            pipe.unet = plain
        for name in calls:
            parts[name]._compiled_call_impl = None
        yield
    finally:
        for name, call in calls.items():
            parts[name]._compiled_call_impl = call
        if plain is not unet:
            pipe.unet = unet
