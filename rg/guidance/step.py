"""The guided step: what stands in for the denoiser's call while guidance is attached."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rg.backbone.conditions import Condition
from rg.backbone.denoiser import denoiser_of, latent_channels
from rg.backbone.families import family_of
from rg.backbone.features import predict, select_rows
from rg.guidance.attach import check_scheduler, shifted_taps
from rg.guidance.call import Call, check_call, running_call
from rg.guidance.clock import Images, StepClock
from rg.guidance.energy import Reading, energy_and_feature_gradients, energy_and_gradient, readouts
from rg.guidance.targets import ReferenceTarget
from rg.guidance.transition import ScheduledStep
from rg.guidance.updates import Transition, alpha_bar, holds_signal, prediction_type

if TYPE_CHECKING:
    from rg.guidance.guidance import ReadoutGuidance

Forward = Callable[..., Any]


@dataclass(frozen=True)
class StepTrace:
    """What guidance did at one step: energy, gradient_norm, delta_norm are (B,), the last of what was added to that
    which the rule moves; condition is whose features were read: "shared" with the pipeline's branch, or the head's
    "own" in a call of its own, "held" where energy and gradient are an earlier step's; readouts are kept on request."""

    step: int
    timestep: float
    energy: Tensor
    gradient_norm: Tensor
    delta_norm: Tensor
    condition: str
    readouts: list[Tensor]


@dataclass(frozen=True)
class Found:
    """What one reading says of B images, which holds until the next.

    energy: (B,). gradients: (B, C, h, w), the one at the latents, or one per tap, None where nothing depends on it.
    condition, readouts: as in StepTrace.
    """

    energy: Tensor
    gradients: list[Tensor | None]
    condition: str
    readouts: list[Tensor]


class GuidedStep:
    """Answers the denoiser's calls of one attachment, steered by the energy's gradient."""

    def __init__(self, guidance: "ReadoutGuidance", pipe: DiffusionPipeline, condition: Condition | None) -> None:
        self.guidance, self.pipe = guidance, pipe
        self.clock = StepClock(pipe)
        self.reader = FeatureReader(pipe, guidance.branch, condition)
        self.scheduler, self.scheduled = pipe.scheduler, ScheduledStep(pipe)
        self._begin()

    def __call__(self, forward: Forward, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """The denoiser's output (B, C', h, w) for its input `sample`, both branches of text guidance in one batch."""
        guidance, call, repeats = self.guidance, running_call(self.pipe), self.scheduled.repeating
        if not repeats and self.clock.advance(timestep):
            self._begin()
            self._check(call)
        if not self._is_guided(sample, timestep):
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        rule, reading = guidance.rule, None
        if not repeats:
            self.scheduled.begin(sample, timestep, inputs, call, times=self._times())
        if repeats or self.found is None or self.guided % guidance.every == 0:
            passes_back = rule.moves != "features"
            reading = self.reader.read(
                forward, sample, timestep, inputs, call, step=self.clock.step, with_gradient=passes_back
            )
            self.found = self._look(reading, passes_back=passes_back)
        self.guided += not repeats
        gradients = self._steering(rule.in_units and self._adds(timestep))
        if rule.moves == "features":
            with shifted_taps(self.reader.denoiser, sample, change := FeatureChange(rule.function, gradients)):
                output = forward(sample, timestep, return_dict=False, **inputs)[0]
            moved = change.made
        elif rule.moves == "input":
            moved = [rule.function(gradients[0])]
            self.shift = moved[0]
            output = forward(add_to_branches(sample, moved[0]), timestep, return_dict=False, **inputs)[0]
        else:
            output = self.reader.complete(reading, forward, sample, timestep, inputs)
            moved = [torch.zeros_like(gradients[0])]
            if rule.moves == "output":
                moved = [self._output_change(rule.function, gradients[0], reading, output, sample, timestep)]
                output = add_to_branches(output, moved[0])
            else:  # by the scheduler's step, which comes next
                self.scheduled.move = partial(self._move_sample, rule.function, gradients[0])
        self._record(reading, timestep, moved)
        return output

    def _begin(self) -> None:
        self.images, self.found, self.guided = Images(), None, 0
        self.shift: Tensor | None = None
        self.scheduled.reset()

    def _check(self, call: Call) -> None:
        """Raises ValueError when the call or the scheduler, which may be another by now, cannot be guided."""
        guidance = self.guidance
        guidance.trace.clear()
        check_call(self.pipe, guidance.update, moves=guidance.rule.moves, repeats=guidance.repeats is not None)
        guidance.check_noise(call.eta)
        flow = family_of(self.reader.denoiser).flow
        check_scheduler(self.pipe.scheduler, guidance.update, repeats=guidance.repeats is not None, flow=flow)
        if guidance.joins_scheduler and self.pipe.scheduler is not self.scheduler:
            what = f"update={guidance.update}" if guidance.rule.joins_scheduler else "repeats"
            raise ValueError(
                f"scheduler: expected with {what} the one that guidance was attached with, got another "
                f"{type(self.pipe.scheduler).__name__}; attach again"
            )

    def _is_guided(self, sample: Tensor, timestep: Tensor) -> bool:
        """Whether the step lies in both windows, and an image is still to be steered."""
        guidance = self.guidance
        within = self.clock.is_within(guidance.start, guidance.stop)
        return (
            within and not self.images.all_settled and self.clock.has_signal(guidance.signal_window, sample, timestep)
        )

    def _times(self) -> int:
        repeats = self.guidance.repeats
        return repeats.times if repeats is not None and self.clock.is_within(repeats.start, repeats.stop) else 1

    def _look(self, reading: Reading, *, passes_back: bool) -> Found:
        """The energy of a reading and its gradient: at the latents, or at the taps alone."""
        terms, factor = self.guidance.terms, self.guidance.latent_range_factor
        gradients: list[Tensor | None]
        if passes_back:
            energy, gradient = energy_and_gradient(terms, reading, range_factor=factor)
            gradients = [gradient]
        else:
            energy, gradients = energy_and_feature_gradients(terms, reading, range_factor=factor)
        kept = energy.readouts if self.guidance.keep_readouts else []
        value = energy.value.unflatten(0, (-1, reading.images)).sum(0)
        return Found(value, gradients, "shared" if reading.shared else "own", kept)

    def _steering(self, in_units: bool) -> list[Tensor | None]:
        """The gradients by which a rule moves: zero for images that have settled."""
        steered = self.images.settle(self.found.energy, self.guidance.enough)
        gradients = [g if g is None or steered.all() else g * steered.view(-1, 1, 1, 1) for g in self.found.gradients]
        return [self.images.in_units(gradients[0])] if in_units else gradients

    def _adds(self, timestep: Tensor) -> bool:
        """Whether the rule does anything at this step: a velocity where x_t is noise is left alone, and has no unit."""
        scheduler = self.pipe.scheduler
        kind = prediction_type(scheduler)
        if self.guidance.rule.moves != "output" or kind == "epsilon":
            return True
        return holds_signal(kind, alpha_bar(scheduler, timestep))

    def _output_change(
        self,
        rule: Callable[..., Tensor],
        gradient: Tensor,
        reading: Reading | None,
        output: Tensor,
        sample: Tensor,
        timestep: Tensor,
    ) -> Tensor:
        """How a rule changes the model's output, given that of the rows that were read, or would be."""
        images, channels = gradient.shape[:2]
        rows = self.reader.rows(len(sample))
        seen, given = (output[rows], sample[rows]) if reading is None else (reading.output, reading.latent)
        abar = alpha_bar(self.pipe.scheduler, timestep)
        return rule(
            gradient,
            seen[:images, :channels],
            given[:images, :channels],
            abar.to(gradient.device, torch.promote_types(abar.dtype, gradient.dtype)),
            prediction_type=prediction_type(self.pipe.scheduler),
        )

    def _move_sample(self, rule: Callable[..., Tensor], gradient: Tensor, step: Transition) -> Tensor:
        moved, trace = rule(gradient, step), self.guidance.trace
        trace[-1] = replace(trace[-1], delta_norm=norm([moved - step.sample]).cpu())
        return moved

    def _record(self, reading: Reading | None, timestep: Tensor, moved: list[Tensor]) -> None:
        found = self.found
        self.guidance.trace.append(
            StepTrace(
                step=self.clock.step,
                timestep=timestep.item(),
                energy=found.energy.cpu(),
                gradient_norm=norm([gradient for gradient in found.gradients if gradient is not None]).cpu(),
                delta_norm=norm(moved).cpu(),
                condition="held" if reading is None else found.condition,
                readouts=found.readouts,
            )
        )

    def pending_shift(self) -> Tensor | None:
        """The change of x_t that the scheduler's coming step has to start from, once."""
        shift, self.shift = self.shift, None
        return shift


class FeatureChange:
    """How a rule changes the feature of each tap, and what it changed."""

    def __init__(self, rule: Callable[..., Tensor], gradients: list[Tensor | None]) -> None:
        self.rule, self.gradients = rule, gradients
        self.made: list[Tensor] = []

    def __call__(self, number: int, feature: Tensor) -> Tensor | None:
        """The change of a tap's feature (rows, C, h, w), None where the energy does not depend on it."""
        gradient = self.gradients[number]
        if gradient is None:
            return None
        change = self.rule(feature, gradient)
        self.made.append(change[: len(gradient)])
        return change


class RecordedStep:
    """Answers the denoiser's calls as it would itself, and stores readouts for the terms with a ReferenceTarget."""

    def __init__(self, guidance: "ReadoutGuidance", pipe: DiffusionPipeline, condition: Condition | None) -> None:
        self.guidance, self.pipe = guidance, pipe
        self.clock = StepClock(pipe)
        self.reader = FeatureReader(pipe, guidance.branch, condition)

    def __call__(self, forward: Forward, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """The denoiser's own output (B, C', h, w)."""
        terms = [term for term in self.guidance.terms if isinstance(term.target, ReferenceTarget)]
        call = running_call(self.pipe)
        if self.clock.advance(timestep):
            self.guidance.trace.clear()
            check_call(self.pipe, self.guidance.update, moves=self.guidance.rule.moves)
            for term in terms:
                term.target.clear()
        if not self.clock.is_within(self.guidance.start, self.guidance.stop):
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        reading = self.reader.read(forward, sample, timestep, inputs, call, step=self.clock.step, with_gradient=False)
        for term, readout in zip(terms, readouts(terms, reading), strict=True):
            term.target.store(reading.step, timestep.item(), readout.unflatten(0, (-1, reading.images)))
        return self.reader.complete(reading, forward, sample, timestep, inputs)


class FeatureReader:
    """Reads features of the rows that guidance looks at: of one branch of text guidance, or of both."""

    def __init__(self, pipe: DiffusionPipeline, branch: str, condition: Condition | None) -> None:
        self.pipe, self.branch, self.condition = pipe, branch, condition
        self.denoiser = denoiser_of(pipe)
        self.channels = latent_channels(self.denoiser)

    def images(self, batch: int) -> int:
        """How many images the pipeline's batch of rows has."""
        return batch // 2 if self.pipe.do_classifier_free_guidance else batch

    def rows(self, batch: int) -> slice:
        """The rows of the pipeline's batch that are read."""
        images = self.images(batch)
        return {"uncond": slice(0, images), "cond": slice(batch - images, batch), "both": slice(0, batch)}[self.branch]

    def read(
        self,
        forward: Forward,
        sample: Tensor,
        timestep: Tensor,
        inputs: dict[str, Any],
        call: Call,
        *,
        step: int,
        with_gradient: bool,
    ) -> Reading:
        """One call of the denoiser for the rows that are read, under the heads' condition where they have one."""
        batch, factor = len(sample), self.pipe.vae_scale_factor
        images, rows = self.images(batch), self.rows(batch)
        image_size = (sample.shape[-2] * factor, sample.shape[-1] * factor)
        given, shared = select_rows(inputs, rows, batch), True
        if self.condition is not None:
            changed = self.condition.replace_in(given, images, image_size)
            given, shared = (given, True) if changed is None else (changed, False)
        with torch.set_grad_enabled(with_gradient):
            x = sample[rows].detach().requires_grad_(with_gradient)
            prediction = predict(self.denoiser, x, timestep, forward=forward, **given)
        return Reading(
            x=x,
            latent=x.detach()[:, : self.channels],
            output=prediction.output.detach(),
            features=prediction.features,
            timestep=timestep,
            step=step,
            images=images,
            image_size=image_size,
            denoiser=self.denoiser,
            num_timesteps=self.pipe.scheduler.config.num_train_timesteps,
            rows=rows,
            shared=shared,
            shown_size=call.image_size,
            images_per_prompt=call.images_per_prompt,
        )

    def complete(
        self, reading: Reading | None, forward: Forward, sample: Tensor, timestep: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """The denoiser's own output for all rows, given that of the rows read, if any were."""
        if reading is None or not reading.shared:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        batch, rows = len(sample), reading.rows
        if len(reading.output) == batch:
            return reading.output
        others = slice(rows.stop, batch) if rows.start == 0 else slice(0, rows.start)
        rest = forward(sample[others], timestep, return_dict=False, **select_rows(inputs, others, batch))[0]
        return torch.cat([reading.output, rest] if rows.start == 0 else [rest, reading.output])


def add_to_branches(value: Tensor, delta: Tensor) -> Tensor:
    """value (k * B, C', h, w) with delta (B, C, h, w) added to the first C channels of each of its k parts."""
    moved = value.clone()
    moved[:, : delta.shape[1]] = value[:, : delta.shape[1]] + delta.repeat(len(value) // len(delta), 1, 1, 1)
    return moved


def norm(parts: list[Tensor]) -> Tensor:
    """Length of B images' tensors (B, ...), of all parts together: (B,)."""
    lengths = [part.flatten(1).norm(dim=1) for part in parts]
    return lengths[0] if len(lengths) == 1 else torch.stack(lengths).square().sum(0).sqrt()
