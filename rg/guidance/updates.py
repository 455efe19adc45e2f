"""What guidance has to know of a diffusers scheduler."""

from typing import Any

import torch
from torch import Tensor


def alpha_bar(scheduler: Any, timestep: Tensor) -> Tensor:
    """abar_t of the coming step's timestep, scalar in [0, 1]; 1 / (1 + sigma^2) where the scheduler keeps sigmas.

    Sigmas come first, by the scheduler's own count of steps: fractional timesteps are in no table, and Karras spacing
    rounds several noise levels to one timestep.
    """
    if not hasattr(scheduler, "sigmas"):
        return scheduler.alphas_cumprod[timestep.long().cpu()]
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return 1 / (1 + scheduler.sigmas[index] ** 2)


def noise_to_output(delta: Tensor, prediction_type: str, abar: Tensor) -> Tensor:
    """A change of the noise prediction as a change of the model's output, at fixed x_t.

    v = (eps - sqrt(1 - abar) x_t) / sqrt(abar) (Salimans and Ho, 2022), so delta_v = delta_eps / sqrt(abar); zero where
    abar is zero, since x_t then holds no signal to steer.
    """
    if prediction_type == "epsilon":
        return delta
    return delta / abar.sqrt() if abar > 0 else torch.zeros_like(delta)


def output_to_noise(output: Tensor, x_t: Tensor, prediction_type: str, abar: Tensor) -> Tensor:
    """The noise prediction in a model's output at x_t: eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
    return output if prediction_type == "epsilon" else abar.sqrt() * output + (1 - abar).sqrt() * x_t
