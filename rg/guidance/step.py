"""The guided step: what stands in for the denoiser's call while guidance is attached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rg.backbone.conditions import Condition, replaced
from rg.backbone.denoiser import denoiser_of, latent_channels
from rg.backbone.features import predict, take_rows
from rg.guidance.attach import check_call
from rg.guidance.energy import Energy, head_time, measure, pull_back
from rg.guidance.targets import ReferenceTarget
from rg.guidance.updates import alpha_bar, noise_to_output, output_to_noise


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


class GuidedRun:
    """One attachment: answers the denoiser's calls and counts the steps of the current sampling run."""

    def __init__(self, guidance: Any, pipe: Any, condition: Condition | None) -> None:
        self.guidance, self.pipe, self.condition = guidance, pipe, condition
        self.channels = latent_channels(denoiser_of(pipe))
        self.timesteps: Tensor | None = None
        self.step = 0
        self.move: Tensor | None = None

    def __call__(self, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        guidance, step, total = self.guidance, *self._count_step()
        if not guidance.start * total <= step < guidance.stop * total:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        images = len(sample) // 2 if self.pipe.do_classifier_free_guidance else len(sample)
        rows, guided_inputs, shared = self._guided_rows(inputs, sample, images)
        output, energy, gradient = self._read(forward, sample[rows], timestep, guided_inputs, images, step)
        if guidance.update == "adam":
            delta = self.move = -guidance.learning_rate * gradient / (gradient.abs() + 1e-8)
            output = forward(shifted(sample, delta), timestep, return_dict=False, **inputs)[0]
        else:
            delta = self._output_change(gradient, output[:images], sample[rows][:images], timestep)
            if not shared:
                output = forward(sample, timestep, return_dict=False, **inputs)[0]
            elif len(output) < len(sample):
                output = self._complete(output, rows, forward, sample, timestep, inputs)
            output = shifted(output, delta)
        self._record(step, timestep, energy, gradient, delta, shared)
        return output

    def _read(
        self, forward: Callable[..., Any], rows: Tensor, timestep: Tensor, inputs: Any, images: int, step: int
    ) -> tuple[Tensor, Energy, Tensor]:
        """The denoiser's output for rows of x_t, the energy of their features, and its gradient at the latents, summed
        over branches: (images, C, h, w). The graph is gone when this returns."""
        with torch.enable_grad():
            x = rows.detach().requires_grad_()
            prediction = predict(denoiser_of(self.pipe), x, timestep, forward=forward, **inputs)
        latent = x.detach()[:, : self.channels]
        energy = measure(self.guidance, self.pipe, prediction.features, latent, timestep, images, step)
        self._check_finite("energy", energy.value, timestep)
        gradient = pull_back(prediction.features, energy.slopes, x)[:, : self.channels]
        gradient = gradient.unflatten(0, (-1, images)).sum(0)
        self._check_finite("gradient", gradient, timestep)
        return prediction.output.detach(), energy, gradient

    def take_move(self) -> Tensor | None:
        """The move of x_t that the scheduler's coming step has to start from, once."""
        move, self.move = self.move, None
        return move

    def _count_step(self) -> tuple[int, int]:
        scheduler = self.pipe.scheduler
        # Every run sets new timesteps, also one that follows a run that was broken off.
        if self.timesteps is not scheduler.timesteps:
            self.timesteps, self.step, self.move = scheduler.timesteps, 0, None
            self.guidance.trace.clear()
            check_call(self.pipe, self.guidance.update)
        self.step += 1
        return self.step - 1, getattr(self.pipe, "num_timesteps", len(scheduler.timesteps))

    def _guided_rows(self, inputs: dict[str, Any], sample: Tensor, images: int) -> tuple[slice, dict[str, Any], bool]:
        """Rows that guidance reads, their inputs, and whether the pipeline's own prediction is shared."""
        batch, factor = len(sample), self.pipe.vae_scale_factor
        rows = {
            "uncond": slice(0, images),
            "cond": slice(batch - images, batch),
            "both": slice(0, batch),
        }[self.guidance.branch]
        taken = take_rows(inputs, rows, batch)
        if self.condition is None:
            return rows, taken, True
        image_size = (sample.shape[-2] * factor, sample.shape[-1] * factor)
        own = self.condition.inputs(images, image_size, taken["encoder_hidden_states"])
        changed = replaced(taken, own)
        return rows, taken if changed is None else changed, changed is None

    def _output_change(self, gradient: Tensor, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The score rule: readout_scale * sqrt(1 - abar_t) * gradient, in the model's own prediction type."""
        prediction_type = self.pipe.scheduler.config.prediction_type
        abar = alpha_bar(self.pipe.scheduler, timestep).to(gradient)
        if self.guidance.normalize == "rms":
            output, x = output[:, : self.channels].float(), x[:, : self.channels].float()
            noise = output_to_noise(output, x, prediction_type, abar)
            size = gradient.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
            reference = noise.flatten(1).square().mean(1).sqrt()
            gradient = gradient * (reference / size).view(-1, 1, 1, 1)
        delta = self.guidance.readout_scale * (1 - abar).sqrt() * gradient
        return noise_to_output(delta, prediction_type, abar)

    def _complete(
        self, output: Tensor, rows: slice, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, inputs: Any
    ) -> Tensor:
        """The prediction of all rows, given that of the guided ones."""
        batch = len(sample)
        others = slice(rows.stop, batch) if rows.start == 0 else slice(0, rows.start)
        rest = forward(sample[others], timestep, return_dict=False, **take_rows(inputs, others, batch))[0]
        return torch.cat([output, rest] if rows.start == 0 else [rest, output])

    def _check_finite(self, name: str, value: Tensor, timestep: Tensor) -> None:
        bad = [row for row, part in enumerate(value.isfinite()) if not part.all()]
        if bad:
            where = f"guidance step {self.step - 1} (t={timestep.item():g})"
            raise FloatingPointError(f"{where}: {name} is not finite for rows {bad}")

    def _record(
        self, step: int, timestep: Tensor, energy: Energy, gradient: Tensor, delta: Tensor, shared: bool
    ) -> None:
        self.guidance.trace.append(
            StepTrace(
                step=step,
                timestep=timestep.item(),
                energy=energy.value.unflatten(0, (-1, len(gradient))).sum(0).cpu(),
                gradient_norm=gradient.flatten(1).norm(dim=1).cpu(),
                delta_norm=delta.flatten(1).norm(dim=1).cpu(),
                condition="shared" if shared else "own",
                readouts=energy.readouts if self.guidance.keep_readouts else [],
            )
        )


def shifted(value: Tensor, delta: Tensor) -> Tensor:
    """value (k * B, C', h, w) with delta (B, C, h, w) added to the first C channels of each of its k parts."""
    moved = value.clone()
    moved[:, : delta.shape[1]] = value[:, : delta.shape[1]] + delta.repeat(len(value) // len(delta), 1, 1, 1)
    return moved


class RecordingRun(GuidedRun):
    """Stores the readouts of every term with a ReferenceTarget; the denoiser's answers stay its own."""

    def __call__(self, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        step, total = self._count_step()
        terms = [term for term in self.guidance.terms if isinstance(term.target, ReferenceTarget)]
        if step == 0:
            for term in terms:
                term.target.clear()
        if not self.guidance.start * total <= step < self.guidance.stop * total:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        images = len(sample) // 2 if self.pipe.do_classifier_free_guidance else len(sample)
        rows, read_inputs, shared = self._guided_rows(inputs, sample, images)
        with torch.no_grad():
            prediction = predict(denoiser_of(self.pipe), sample[rows], timestep, forward=forward, **read_inputs)
            features = [feature.float() for feature in prediction.features]
            for term in terms:
                readout = term.head(features, head_time(term.head, self.pipe, timestep.expand(len(features[0]))))
                term.target.store(step, timestep.item(), readout.unflatten(0, (-1, images)))
        if not shared:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        if len(prediction.output) < len(sample):
            return self._complete(prediction.output, rows, forward, sample, timestep, inputs)
        return prediction.output
