"""The guided step: what stands in for the denoiser's call while guidance is attached."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rg.hooks import embed_time, predict, take_rows
from rg.schedules import alpha_bar, noise_to_output, output_to_noise


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

    def __init__(self, guidance: Any, pipe: Any, condition: Tensor | None) -> None:
        self.guidance, self.pipe, self.condition = guidance, pipe, condition
        self.timesteps: Tensor | None = None
        self.step = 0
        self.move: Tensor | None = None

    def __call__(self, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        guidance, step, total = self.guidance, *self._count_step()
        if not guidance.start * total <= step < guidance.stop * total:
            return forward(sample, timestep, return_dict=False, **inputs)[0]
        images = len(sample) // 2 if self.pipe.do_classifier_free_guidance else len(sample)
        rows, guided_inputs, shared = self._guided_rows(inputs, len(sample), images)
        with torch.enable_grad():
            x = sample[rows].detach().requires_grad_()
            prediction = predict(self.pipe.unet, x, timestep, forward=forward, **guided_inputs)
            energy, readouts = self._energy(prediction.features, x, timestep, images)
            self._check_finite("energy", energy, timestep)
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        output = prediction.output.detach()
        gradient = gradient.unflatten(0, (-1, images)).sum(0)
        self._check_finite("gradient", gradient, timestep)
        if guidance.update == "adam":
            delta = self.move = -guidance.learning_rate * gradient / (gradient.abs() + 1e-8)
            sample = sample + delta.repeat(len(sample) // images, 1, 1, 1)
            output = forward(sample, timestep, return_dict=False, **inputs)[0]
        else:
            delta = self._output_change(gradient, output[:images], x.detach()[:images], timestep)
            if not shared:
                output = forward(sample, timestep, return_dict=False, **inputs)[0]
            elif len(output) < len(sample):
                output = self._complete(output, rows, forward, sample, timestep, inputs)
            output = output + delta.repeat(len(sample) // images, 1, 1, 1)
        self._record(step, timestep, energy, gradient, delta, shared, readouts)
        return output

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
            if getattr(self.pipe, "guidance_rescale", 0.0) > 0 and self.guidance.update == "score":
                raise ValueError("guidance_rescale: it would rescale the score update too; expected 0.0")
        self.step += 1
        return self.step - 1, getattr(self.pipe, "num_timesteps", len(scheduler.timesteps))

    def _guided_rows(self, inputs: dict[str, Any], batch: int, images: int) -> tuple[slice, dict[str, Any], bool]:
        """Rows that guidance reads, their inputs, and whether the pipeline's own prediction is shared."""
        branch = self.guidance.branch
        rows = {"uncond": slice(0, images), "cond": slice(batch - images, batch), "both": slice(0, batch)}[branch]
        taken = take_rows(inputs, rows, batch)
        if branch != "uncond" or self.condition is None:
            return rows, taken, True
        held = taken["encoder_hidden_states"]
        own = self.condition.to(held).expand(images, -1, -1)
        if own.shape == held.shape and torch.allclose(own, held, rtol=1e-3, atol=1e-4):
            return rows, taken, True
        return rows, {**taken, "encoder_hidden_states": own}, False

    def _energy(self, features: list[Tensor], x: Tensor, timestep: Tensor, images: int) -> tuple[Tensor, list[Tensor]]:
        """Summed energy (rows,) and the readout of every term."""
        features = [feature.float() for feature in features]
        image_size = (x.shape[-2] * self.pipe.vae_scale_factor, x.shape[-1] * self.pipe.vae_scale_factor)
        train_steps = self.pipe.scheduler.config.num_train_timesteps
        total, readouts = x.new_zeros(len(x), dtype=torch.float32), []
        for term in self.guidance.terms:
            times = timestep.expand(len(x))
            index = term.head.time_index(times, train_steps) if hasattr(term.head, "time_index") else times
            readout = term.head(features, None if index is None else embed_time(self.pipe.unet, index).float())
            energy = readout
            if term.target is not None:
                size = (readout.shape[-2], readout.shape[-1])
                target = term.target.encode(term.head, readout_size=size, image_size=image_size, device=x.device)
                if len(target) not in (1, images):
                    raise ValueError(f"control: expected 1 or {images} of them, one per image, got {len(target)}")
                energy = term.head.energy(readout, target.repeat(len(x) // len(target), 1, 1, 1))
            readout_span = getattr(term.head, "readout_span", 1.0)
            if self.guidance.latent_range_factor and readout_span is not None:
                span = (x.detach().flatten(1).amax(1) - x.detach().flatten(1).amin(1)).float()
                energy = energy * (span / readout_span) ** 2
            if energy.shape != total.shape:
                raise ValueError(f"head: expected one energy per row, {tuple(total.shape)}, got {tuple(energy.shape)}")
            total = total + term.weight * energy
            readouts.append(readout.detach())
        return total, readouts

    def _output_change(self, gradient: Tensor, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The score rule: readout_scale * sqrt(1 - abar_t) * gradient, in the model's own prediction type."""
        prediction_type = self.pipe.scheduler.config.prediction_type
        abar = alpha_bar(self.pipe.scheduler, timestep).to(gradient)
        if self.guidance.normalize == "rms":
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
        self,
        step: int,
        timestep: Tensor,
        energy: Tensor,
        gradient: Tensor,
        delta: Tensor,
        shared: bool,
        readouts: list[Tensor],
    ) -> None:
        self.guidance.trace.append(
            StepTrace(
                step=step,
                timestep=timestep.item(),
                energy=energy.detach().unflatten(0, (-1, len(gradient))).sum(0).cpu(),
                gradient_norm=gradient.flatten(1).norm(dim=1).cpu(),
                delta_norm=delta.flatten(1).norm(dim=1).cpu(),
                condition="shared" if shared else "own",
                readouts=readouts if self.guidance.keep_readouts else [],
            )
        )
