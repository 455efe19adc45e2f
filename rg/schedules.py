"""What guidance has to know of a diffusers scheduler."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


def check_scheduler(scheduler: Any, update: str) -> None:
    """Raises ValueError when there is no guidance rule for this scheduler."""
    name = type(scheduler).__name__
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"scheduler: guidance needs a variance-preserving schedule (alphas_cumprod), {name} has none")
    if scheduler.config.prediction_type not in PREDICTIONS:
        raise ValueError(
            f"scheduler: prediction_type is {scheduler.config.prediction_type!r}, expected one of {PREDICTIONS}"
        )
    if update == "adam" and not isinstance(scheduler, DDIMScheduler):
        raise ValueError(f"scheduler: update=adam is defined for DDIMScheduler, got {name}; use update=score")


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


@contextmanager
def moved_samples(scheduler: Any, take_move: Callable[[], Tensor | None]) -> Iterator[None]:
    """Adds `take_move()` to the sample of every scheduler step inside the context."""
    step, own_step = scheduler.step, vars(scheduler).get("step")

    # Pipelines look at the signature to know whether the scheduler takes eta and a generator.
    @functools.wraps(step)
    def moved_step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        move = take_move()
        moved = sample if move is None else (sample + move).to(sample.dtype)
        return step(model_output, timestep, moved, *args, **kwargs)

    scheduler.step = moved_step
    try:
        yield
    finally:
        if own_step is None:
            del scheduler.step
        else:
            scheduler.step = own_step
