"""The guided step: what stands in for the denoiser's call while guidance is attached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rg.backbone.conditions import Condition
from rg.backbone.denoiser import denoiser_of, latent_channels
from rg.backbone.features import predict, select_rows
from rg.guidance.attach import check_scheduler
from rg.guidance.call import Call, check_call, running_call
from rg.guidance.energy import Reading, energy_and_gradient, readouts
from rg.guidance.targets import ReferenceTarget
from rg.guidance.updates import adam, alpha_bar, score

if TYPE_CHECKING:
    from rg.guidance.guidance import ReadoutGuidance

Forward = Callable[..., Any]


@dataclass(frozen=True)
class StepTrace:
    """What guidance did at one step: energy, gradient_norm, delta_norm are (B,); condition is whose features were read:
    "shared" with the pipeline's branch, or the head's "own" in a call of its own; readouts are kept on request."""

    step: int
    timestep: float
    energy: Tensor
    gradient_norm: Tensor
    delta_norm: Tensor
    condition: str
    readouts: list[Tensor]


class GuidedStep:
    """Answers the denoiser's calls of one attachment, steered by the energy's gradient."""

    def __init__(self, guidance: "ReadoutGuidance", pipe: DiffusionPipeline, condition: Condition | None) -> None:
        self.guidance, self.pipe = guidance, pipe
        self.clock = StepClock(pipe)
        self.reader = FeatureReader(pipe, guidance.branch, condition)
        self.scheduler = pipe.scheduler
        self.shift: Tensor | None = None

    def __call__(self, forward: Forward, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """The denoiser's output (B, C', h, w) for its input `sample`, both branches of text guidance in one batch."""
        guidance, call = self.guidance, running_call(self.pipe)
        if self.clock.advance(timestep):
            guidance.trace.clear()
            self.shift = None
            check_call(self.pipe, guidance.update)
            self.check_scheduler()
        if not self.clock.is_within(guidance.start, guidance.stop):
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        reading = self.reader.read(forward, sample, timestep, inputs, call, step=self.clock.step, with_gradient=True)
        energy, gradient = energy_and_gradient(guidance.terms, reading, range_factor=guidance.latent_range_factor)
        if guidance.update == "adam":
            delta = self.shift = adam(gradient, guidance.learning_rate)
            output = forward(add_to_branches(sample, delta), timestep, return_dict=False, **inputs)[0]
        else:
            delta = score(
                gradient,
                reading.output[: reading.images, : gradient.shape[1]],
                reading.latent[: reading.images],
                alpha_bar(self.pipe.scheduler, timestep).to(gradient),
                scale=guidance.readout_scale,
                prediction_type=self.pipe.scheduler.config.prediction_type,
                normalize=guidance.normalize,
            )
            output = add_to_branches(self.reader.complete(reading, forward, sample, timestep, inputs), delta)
        guidance.trace.append(
            StepTrace(
                step=reading.step,
                timestep=timestep.item(),
                energy=energy.value.unflatten(0, (-1, len(gradient))).sum(0).cpu(),
                gradient_norm=gradient.flatten(1).norm(dim=1).cpu(),
                delta_norm=delta.flatten(1).norm(dim=1).cpu(),
                condition="shared" if reading.shared else "own",
                readouts=energy.readouts if guidance.keep_readouts else [],
            )
        )
        return output

    def check_scheduler(self) -> None:
        """Raises ValueError when the pipeline's scheduler, which may be another by now, cannot be guided."""
        check_scheduler(self.pipe.scheduler, self.guidance.update)
        if self.guidance.update == "adam" and self.pipe.scheduler is not self.scheduler:
            raise ValueError(
                "scheduler: expected with update=adam the one that guidance was attached with, got another "
                f"{type(self.pipe.scheduler).__name__}; attach again"
            )

    def pending_shift(self) -> Tensor | None:
        """The change of x_t that the scheduler's coming step has to start from, once."""
        shift, self.shift = self.shift, None
        return shift


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
            check_call(self.pipe, self.guidance.update)
            for term in terms:
                term.target.clear()
        if not self.clock.is_within(self.guidance.start, self.guidance.stop):
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        reading = self.reader.read(forward, sample, timestep, inputs, call, step=self.clock.step, with_gradient=False)
        for term, readout in zip(terms, readouts(terms, reading), strict=True):
            term.target.store(reading.step, timestep.item(), readout.unflatten(0, (-1, reading.images)))
        return self.reader.complete(reading, forward, sample, timestep, inputs)


class StepClock:
    """Counts the executed steps of a pipeline's current sampling run from 0."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.step = pipe, -1
        self.timesteps: Tensor | None = None
        self.coming: list[list[float]] = []

    def advance(self, timestep: Tensor) -> bool:
        """Goes on to the next step; whether it is the first of a run.

        Raises:
            ValueError: the pipeline calls its denoiser otherwise than once for each of its scheduler's timesteps.
        """
        # Every run sets new timesteps, also one that follows a run that was broken off.
        begins = self.timesteps is not self.pipe.scheduler.timesteps
        self.timesteps = self.pipe.scheduler.timesteps
        self.step = 0 if begins else self.step + 1
        if begins:  # at any of them: img2img leaves the first ones out
            times = self.timesteps.tolist()
            self.coming = [times[start:] for start in range(len(times))]
        now = timestep.item()
        self.coming = [times[1:] for times in self.coming if times and abs(times[0] - now) < 0.5]
        if not self.coming:
            raise ValueError(
                f"pipeline: expected one call of the denoiser for each of the scheduler's timesteps, in their order, "
                f"got t={now:g} as call {self.step} of {type(self.pipe).__name__}"
            )
        return begins

    def is_within(self, start: float, stop: float) -> bool:
        """Whether the step lies in a window of fractions of the executed steps."""
        total = getattr(self.pipe, "num_timesteps", len(self.timesteps))
        return start * total <= self.step < stop * total


class FeatureReader:
    """Reads features of the rows that guidance looks at: of one branch of text guidance, or of both."""

    def __init__(self, pipe: DiffusionPipeline, branch: str, condition: Condition | None) -> None:
        self.pipe, self.branch, self.condition = pipe, branch, condition
        self.denoiser = denoiser_of(pipe)
        self.channels = latent_channels(self.denoiser)

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
        images = batch // 2 if self.pipe.do_classifier_free_guidance else batch
        rows = {"uncond": slice(0, images), "cond": slice(batch - images, batch), "both": slice(0, batch)}[self.branch]
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
        self, reading: Reading, forward: Forward, sample: Tensor, timestep: Tensor, inputs: dict[str, Any]
    ) -> Tensor:
        """The denoiser's own output for all rows, given that of the rows read."""
        batch, rows = len(sample), reading.rows
        if not reading.shared:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
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
