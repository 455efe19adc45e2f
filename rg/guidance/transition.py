"""The scheduler's step from x_t to x_{t-1}, for rules that take part in it: its parts, and how it is taken again."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from rg.backbone.denoiser import denoiser_of, latent_channels
from rg.backbone.features import select_rows
from rg.guidance.call import Call
from rg.guidance.updates import Transition

Generators = torch.Generator | list[torch.Generator] | None


class ScheduledStep:
    """Answers a DDIM scheduler's steps: moves x_{t-1} as a rule says, and takes a step several times.

    move: what makes x_{t-1} of the coming step's Transition; None leaves it to the scheduler.
    repeating: whether the denoiser is being called for a step that was taken before.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe, self.repeating = pipe, False
        self.reset()

    def reset(self) -> None:
        """Leaves the coming step to the scheduler."""
        self.move: Callable[[Transition], Tensor] | None = None
        self.times = 1
        self.given: tuple[Tensor, Tensor, dict[str, Any], Call] | None = None

    def begin(self, sample: Tensor, timestep: Tensor, inputs: dict[str, Any], call: Call, *, times: int) -> None:
        """The denoiser's call (see GuidedStep) of the step that is to be taken `times` times."""
        self.reset()
        self.times = times
        if times > 1:  # the denoiser may consume what it is given
            self.given = (sample, timestep, select_rows(inputs, slice(0, len(sample)), len(sample)), call)

    def answer(
        self,
        step: Callable[..., Any],
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: Generators = None,
        return_dict: bool = True,
        **others: Any,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """What DDIMScheduler.step gives."""
        for coming in reversed(range(self.times)):
            if self.move is None:
                result = step(model_output, timestep, sample, eta=eta, generator=generator, **others)
            else:
                move, self.move = self.move, None
                found, origin = transition(
                    self.pipe.scheduler, step, model_output, timestep, sample, eta=eta, generator=generator, **others
                )
                result = DDIMSchedulerOutput(prev_sample=move(found).to(sample.dtype), pred_original_sample=origin)
            if coming:
                abar, before = levels(self.pipe.scheduler, timestep)
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
                sample = noised(result.prev_sample, noise, abar / before)
                model_output = self._predict(sample)
        self.reset()
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def _predict(self, x_t: Tensor) -> Tensor:
        """The guided prediction at another x_t (B, C, h, w) of the step, branches of text guidance combined."""
        sample, timestep, inputs, call = self.given
        denoiser, guided = denoiser_of(self.pipe), self.pipe.do_classifier_free_guidance
        channels = latent_channels(denoiser)
        whole = sample.clone()
        whole[:, :channels] = x_t.repeat(2 if guided else 1, 1, 1, 1)
        self.repeating = True
        try:
            # By the front door, as the pipeline does: offloading brings the weights there.
            fresh = select_rows(inputs, slice(0, len(sample)), len(sample))
            output = denoiser(whole, timestep, return_dict=False, **fresh)[0][:, :channels]
        finally:
            self.repeating = False
        if not guided:
            return output
        without, with_text = output.chunk(2)
        return without + call.guidance_scale * (with_text - without)


def levels(scheduler: DDIMScheduler, timestep: Tensor | int) -> tuple[Tensor, Tensor]:
    """abar_t and abar_{t-1} of a step of DDIM, scalars."""
    now = int(timestep)
    before = now - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    final = scheduler.final_alpha_cumprod
    return scheduler.alphas_cumprod[now], scheduler.alphas_cumprod[before] if before >= 0 else final


def transition(
    scheduler: DDIMScheduler,
    step: Callable[..., Any],
    model_output: Tensor,
    timestep: Tensor | int,
    sample: Tensor,
    *,
    eta: float,
    generator: Generators,
    **others: Any,
) -> tuple[Transition, Tensor]:
    """The parts of DDIM's step and its x0; the noise is what the scheduler itself would draw.

    sigma = eta sqrt((1 - abar_{t-1}) / (1 - abar_t) (1 - abar_t / abar_{t-1})) (Song et al., 2021, eq. 16).
    """
    abar, before = (level.to(torch.float64) for level in levels(scheduler, timestep))
    sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).clamp_min(0).sqrt()
    noise = torch.zeros_like(model_output)
    if eta > 0:
        noise = randn_tensor(noise.shape, generator=generator, device=noise.device, dtype=noise.dtype)
        others["variance_noise"] = torch.zeros_like(model_output)
    result = step(model_output, timestep, sample, eta=eta, **others)
    precise = torch.promote_types(sample.dtype, torch.float32)
    parts = (result.prev_sample, noise, sigma, abar, before)
    found = Transition(*(part.to(device=sample.device, dtype=precise) for part in parts))
    return found, result.pred_original_sample


def noised(sample: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """x_t of x_{t-1}: sqrt(alpha) sample + sqrt(1 - alpha) noise, with alpha = abar_t / abar_{t-1}."""
    alpha = alpha.to(sample)
    return alpha.sqrt() * sample + (1 - alpha).sqrt() * noise
