"""What is changed on a diffusers pipeline while guidance answers for its denoiser, and which pipelines are refused."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from rg.backbone.conditions import Condition, encode_condition
from rg.backbone.denoiser import CFG_FLAG, denoiser_name, denoiser_of, taps
from rg.backbone.families import TapOutput, family_of
from rg.backbone.features import as_map, check_sample, outside_inference_mode, token_count
from rg.guidance.updates import FLOW, prediction_type
from rg.heads.protocol import EnergyHead, FunctionHead

if TYPE_CHECKING:
    from rg.guidance.guidance import ReadoutGuidance

log = logging.getLogger(__name__)

Step = TypeVar("Step", bound=Callable[..., Tensor])


@contextmanager
def answering(
    pipe: DiffusionPipeline,
    guidance: "ReadoutGuidance",
    make_step: "Callable[[ReadoutGuidance, DiffusionPipeline, Condition | None], Step]",
) -> Iterator[Step]:
    """Lets a step answer for the denoiser of `pipe` inside the context; afterwards the pipeline is as it was.

    Raises:
        ValueError: there is no rule for the pipeline, or a head was made for another.
    """
    check_weights("denoiser", denoiser_of(pipe))
    for term in guidance.terms:
        check_head(term.head, pipe)
    condition = None
    if guidance.prompt is not None and guidance.branch == "uncond":
        condition = encode_condition(pipe, guidance.prompt)
        pipe.maybe_free_model_hooks()  # an offloaded text encoder goes back
    with uncompiled(pipe), expose_cfg_flag(pipe), raise_on_overflow(pipe):
        step = make_step(guidance, pipe, condition)
        with hooked(denoiser_of(pipe), step, checkpointing=guidance.checkpointing):
            yield step


def check_head(head: EnergyHead, pipe: DiffusionPipeline) -> None:
    """Raises ValueError when a head was made for another model, or is in another precision or place than it must be."""
    head.check_denoiser(denoiser_of(pipe))
    network = head.function if isinstance(head, FunctionHead) else head
    weight = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if weight is None:
        return
    check_weights("head", network)
    if weight.dtype != torch.float32:
        raise ValueError(f"head: expected float32 weights, whatever the pipeline's, got {weight.dtype}: head.float()")
    if weight.device.type != pipe._execution_device.type:
        device = pipe._execution_device
        raise ValueError(f"head: expected it on the pipeline's {device}, got {weight.device}: head.to({str(device)!r})")


def check_weights(name: str, network: nn.Module) -> None:
    """Raises ValueError when weights were made in inference mode: no gradient passes through them."""
    if any(parameter.is_inference() for parameter in network.parameters()):
        raise ValueError(
            f"{name}: expected weights that were loaded, and moved by offloading, outside of torch.inference_mode(), "
            "got some from inside; torch.no_grad() serves as well"
        )


@contextmanager
def expose_cfg_flag(pipe: DiffusionPipeline) -> Iterator[None]:
    """Makes a pipeline say whether its batch has an unconditional half. PixArt's have no such property: they tell their
    encode_prompt. Flux's batch never has one."""
    if hasattr(type(pipe), CFG_FLAG):
        yield
        return
    encode, names = pipe.encode_prompt, ("encode_prompt", CFG_FLAG)
    before = {name: vars(pipe)[name] for name in names if name in vars(pipe)}

    @functools.wraps(encode)
    def encode_prompt(
        prompt: str | list[str] | None, do_classifier_free_guidance: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[Tensor | None, ...]:
        setattr(pipe, CFG_FLAG, do_classifier_free_guidance)
        return encode(prompt, do_classifier_free_guidance, *args, **kwargs)

    if family_of(denoiser_of(pipe)).branches == "never":
        setattr(pipe, CFG_FLAG, False)
    else:
        pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        for name in names:
            vars(pipe).pop(name, None)
        vars(pipe).update(before)


@contextmanager
def uncompiled(pipe: DiffusionPipeline) -> Iterator[None]:
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


HOOK_NAME = "readout_guidance"
CHECKPOINTING = ("gradient_checkpointing", "_gradient_checkpointing_func")


class _DenoiserHook(ModelHook):
    def __init__(self, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call = call

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> UNet2DConditionOutput | tuple[Tensor]:
        family = family_of(module)
        given = dict(zip((family.sample, "timestep"), args, strict=False)) | kwargs
        if len(args) > 2:
            raise TypeError("a guided denoiser takes keyword arguments after (sample, timestep)")
        sample, timestep = family.unpacked(given.pop(family.sample), given), given.pop("timestep")
        return_dict = given.pop("return_dict", True)
        check_sample(module, sample)

        def forward(sample: Tensor, timestep: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
            return family.call(self.fn_ref.original_forward, sample, timestep.expand(len(sample)), **inputs)

        # No gradient is to be had of what is made in inference mode, which a caller may be in.
        if torch.is_inference_mode_enabled():
            check_weights("denoiser", module)  # offloading may have brought them just now
        with torch.inference_mode(False), torch.no_grad():
            timestep = family.scheduler_time(torch.as_tensor(timestep, device=sample.device))
            output = self.call(forward, *outside_inference_mode((sample, timestep)), **outside_inference_mode(given))
            output = family.packed(output)
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
    trainable = {name: parameter for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    checkpointed = {m: {k: v for k, v in vars(m).items() if k in CHECKPOINTING} for m in denoiser.modules()}
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    with _inside_offload(denoiser):
        registry.register_hook(_DenoiserHook(call), HOOK_NAME)
    try:
        for parameter in trainable.values():
            parameter.requires_grad_(False)
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
        # Offloading replaces parameters under their names, adapters that come and go rename them.
        known = {id(parameter) for parameter in trainable.values()}
        for name, parameter in denoiser.named_parameters():
            if name in trainable or id(parameter) in known:
                parameter.requires_grad_(True)
        for module, state in checkpointed.items():
            for name in CHECKPOINTING:
                vars(module).pop(name, None)
            vars(module).update(state)


@contextmanager
def raise_on_overflow(pipe: DiffusionPipeline) -> Iterator[None]:
    """Makes an autoencoder whose decoder overflows raise FloatingPointError, instead of giving black images."""

    def check(_decoder: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        if output.isfinite().all():
            return
        if not given[0].isfinite().all():
            raise FloatingPointError("latents: expected finite values to decode, got nan or inf from sampling")
        raise FloatingPointError(
            f"vae: expected finite images, its decoder overflows in {output.dtype}: load the pipeline in bfloat16 or "
            "float32, set vae.config.force_upcast where the pipeline heeds it (SDXL), or take an autoencoder made for "
            "half precision"
        )

    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    if decoder is None:
        yield
        return
    handle = decoder.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


# Variance-preserving ones whose abar_t is known at every call of the model.
SCHEDULERS = (
    *("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "DDPMScheduler", "DDPMParallelScheduler"),
    *("PNDMScheduler", "LCMScheduler", "TCDScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
    *("DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LMSDiscreteScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
)
PREDICTIONS = ("epsilon", "v_prediction")
# For x_t = (1 - s) x0 + s noise, whose s is known at every call.
FLOW_SCHEDULERS = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
)
# Rules that take part in the scheduler's step, whose formula they have to know; the others go with all of the above.
OWN_SCHEDULERS = dict.fromkeys(("adam", "dsg", "freedom", "mpgd", "repeats"), DDIMScheduler)


def check_scheduler(scheduler: SchedulerMixin, update: str, *, repeats: bool = False, flow: bool = False) -> None:
    """Raises ValueError when there is no guidance rule for this scheduler, or no way to repeat its steps.

    Args:
        flow: whether it is to be one for a flow-matching model.
    """
    name = type(scheduler).__name__
    (_check_flow if flow else _check_variance_preserving)(scheduler, name)
    if not isinstance(scheduler, OWN_SCHEDULERS.get(update, SchedulerMixin)):
        raise ValueError(
            f"scheduler: update={update} is defined for {OWN_SCHEDULERS[update].__name__}, got {name}; use update=score"
        )
    if repeats and not isinstance(scheduler, OWN_SCHEDULERS["repeats"]):
        raise ValueError(f"scheduler: repeats are defined for {OWN_SCHEDULERS['repeats'].__name__}, got {name}")


def _check_variance_preserving(scheduler: SchedulerMixin, name: str) -> None:
    if not any(base.__name__ in SCHEDULERS for base in type(scheduler).__mro__):
        raise ValueError(f"scheduler: expected a variance-preserving one of {SCHEDULERS}, got {name}")
    if scheduler.config.get("use_flow_sigmas", False):
        raise ValueError(f"scheduler: expected use_flow_sigmas=False, got True: {name} is not variance-preserving then")
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise ValueError(
            f"scheduler: prediction_type is {scheduler.config.prediction_type!r}, expected one of {PREDICTIONS}"
        )


def _check_flow(scheduler: SchedulerMixin, name: str) -> None:
    config = scheduler.config
    known = any(base.__name__ in FLOW_SCHEDULERS for base in type(scheduler).__mro__)
    if not known or not config.get("use_flow_sigmas", True) or prediction_type(scheduler) != FLOW:
        raise ValueError(
            f"scheduler: the denoiser is a flow-matching one, expected one of {FLOW_SCHEDULERS}, where they have them "
            f"with use_flow_sigmas=True and prediction_type={FLOW!r}, got {name}"
        )
    if config.get("invert_sigmas", False):
        raise ValueError("scheduler: expected invert_sigmas=False, got True: no rule knows noise levels that rise")


@contextmanager
def scheduler_step(scheduler: SchedulerMixin, answer: Callable[..., Any]) -> Iterator[None]:
    """Lets `answer(step, model_output, timestep, sample, **arguments)` answer for `scheduler.step` inside the context.

    Args:
        answer: gets the scheduler's own step first.
    """
    step, own_step = scheduler.step, vars(scheduler).get("step")

    # Pipelines look at the signature to know whether the scheduler takes eta and a generator.
    @functools.wraps(step)
    def answered(*args: Any, **kwargs: Any) -> SchedulerOutput | tuple[Tensor, ...]:
        return answer(step, *args, **kwargs)

    scheduler.step = answered
    try:
        yield
    finally:
        if own_step is None:
            del scheduler.step
        else:
            scheduler.step = own_step


@contextmanager
def shift_scheduler_input(scheduler: SchedulerMixin, pending_shift: Callable[[], Tensor | None]) -> Iterator[None]:
    """Adds `pending_shift()` to the sample of every scheduler step inside the context."""

    def shifted(
        step: Callable[..., Any],
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        shift = pending_shift()
        moved = sample if shift is None else (sample + shift).to(sample.dtype)
        return step(model_output, timestep, moved, *args, **kwargs)

    with scheduler_step(scheduler, shifted):
        yield


@contextmanager
def shifted_taps(denoiser: nn.Module, sample: Tensor, change: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
    """Adds `change(number, feature)` to what every tap gives inside the context, in a call on latents `sample`.

    Args:
        change: of a feature (B, C, h, w) in float32; None leaves it alone.
    """

    family, count = family_of(denoiser), token_count(denoiser, sample)

    def shift(number: int, output: TapOutput) -> TapOutput:
        tokens = family.tokens(output, count)
        moved = change(number, as_map(tokens, denoiser, sample).float())
        if moved is None:
            return output
        moved = moved if tokens.ndim == 4 else moved.flatten(2).transpose(1, 2)
        return family.with_tokens(output, (tokens + moved).to(tokens.dtype))

    handles = [
        tap.register_forward_hook(lambda _tap, _given, output, number=number: shift(number, output))
        for number, tap in enumerate(taps(denoiser).values())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
