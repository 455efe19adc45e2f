"""The rules by which a gradient moves a sampling step, as pure functions, and what they need of the schedule.

Gradients and latents are (B, C, h, w). abar is abar_t, the share of signal in x_t's variance (Ho et al., 2020).
"""

import torch
from diffusers import SchedulerMixin
from torch import Tensor


def score(
    gradient: Tensor,
    output: Tensor,
    x_t: Tensor,
    abar: Tensor,
    *,
    scale: float,
    prediction_type: str,
    normalize: str | None = None,
) -> Tensor:
    """The change of a model's output that adds scale * sqrt(1 - abar) * gradient to its noise prediction.

    The classifier-guidance form of Luo et al., 2024, section 3.3 (Dhariwal and Nichol, 2021, algorithm 2).

    Args:
        output, x_t: the model's output in its prediction type, and what it was given; read with normalize alone.
        normalize: None, or "rms": the gradient is first scaled to the RMS of the noise prediction, image by image.
    """
    if normalize == "rms":
        noise = output_to_noise(output.float(), x_t.float(), prediction_type, abar)
        size = gradient.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
        reference = noise.flatten(1).square().mean(1).sqrt()
        gradient = gradient * (reference / size).view(-1, 1, 1, 1)
    return noise_to_output(scale * (1 - abar).sqrt() * gradient, prediction_type, abar)


def adam(gradient: Tensor, learning_rate: float) -> Tensor:
    """The change of x_t by the first step of a fresh Adam, as the authors' code does at every timestep."""
    return -learning_rate * gradient / (gradient.abs() + 1e-8)


def alpha_bar(scheduler: SchedulerMixin, timestep: Tensor) -> Tensor:
    """abar_t of the coming step's timestep, scalar in [0, 1]; 1 / (1 + sigma^2) where the scheduler keeps sigmas.

    Sigmas come first, by the scheduler's own count of steps: fractional timesteps are in no table, and Karras spacing
    rounds several noise levels to one timestep.
    """
    if hasattr(scheduler, "sigmas_interpol"):  # KDPM2 calls the model between its sigmas too
        return type(scheduler).scale_model_input(scheduler, torch.ones(()), timestep) ** 2
    if not hasattr(scheduler, "sigmas"):
        return scheduler.alphas_cumprod[timestep.long().cpu()]
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return 1 / (1 + scheduler.sigmas[index] ** 2)


# abar below which x_t holds no signal to steer. Schedules of zero terminal SNR end in 0, or in 2^-24 where a scheduler
# keeps sigmas; others in 5e-3, and a hundred steps of such a schedule stay above 2e-5.
NO_SIGNAL = 1e-5


def noise_to_output(delta: Tensor, prediction_type: str, abar: Tensor) -> Tensor:
    """A change of the noise prediction as a change of the model's output, at fixed x_t.

    v = (eps - sqrt(1 - abar) x_t) / sqrt(abar) (Salimans and Ho, 2022), so delta_v = delta_eps / sqrt(abar); zero where
    abar is below NO_SIGNAL.
    """
    if prediction_type == "epsilon":
        return delta
    return delta / abar.sqrt() if abar > NO_SIGNAL else torch.zeros_like(delta)


def output_to_noise(output: Tensor, x_t: Tensor, prediction_type: str, abar: Tensor) -> Tensor:
    """The noise prediction in a model's output at x_t: eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
    return output if prediction_type == "epsilon" else abar.sqrt() * output + (1 - abar).sqrt() * x_t
