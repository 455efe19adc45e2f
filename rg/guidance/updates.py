"""The rules by which a gradient moves a sampling step, as pure functions, and what they need of the schedule.

Gradients and latents are (B, C, h, w). abar is abar_t, the share of signal in x_t's variance (Ho et al., 2020); flow
matching's x_t = (1 - s) x0 + s noise has (1 - s)^2 / ((1 - s)^2 + s^2). Rules with a `strength` multiply by it the
coefficient that their paper names, whose default is what strength 1 is.
"""

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

# What strength 1 of the score rule is: times the noise prediction's RMS, which is 1, at an image's first gradient.
UNIT = 0.9


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
    """The change of a model's output that adds scale * n * gradient to its noise prediction, with n the noise in x_t.

    The classifier-guidance form of Luo et al., 2024, section 3.3 (Dhariwal and Nichol, 2021, algorithm 2), where n is
    sqrt(1 - abar). Flow matching has n = s, and its velocity changes by scale * s / (1 - s) * gradient.

    Args:
        output, x_t: the model's output in its prediction type, and what it was given; read with normalize alone.
        normalize: None, or "rms": the gradient is first scaled to the RMS of the noise prediction, image by image.
    """
    if normalize == "rms":
        noise = output_to_noise(output.float(), x_t.float(), prediction_type, abar)
        size = gradient.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
        reference = noise.flatten(1).square().mean(1).sqrt()
        gradient = gradient * (reference / size).view(-1, 1, 1, 1)
    return noise_to_output(scale * noise_level(prediction_type, abar) * gradient, prediction_type, abar)


def adam(gradient: Tensor, learning_rate: float) -> Tensor:
    """The change of x_t by the first step of a fresh Adam, as the authors' code does at every timestep."""
    return -learning_rate * gradient / (gradient.abs() + 1e-8)


def velocity_norm(
    gradient: Tensor,
    output: Tensor,
    x_t: Tensor,
    abar: Tensor,
    *,
    prediction_type: str,
    strength: float = 1.0,
    weight: float = 0.5,
) -> Tensor:
    """The change of a model's output that adds weight * |v| * gradient / |gradient| to its velocity, image by image.

    v = sqrt(abar) noise - sqrt(1 - abar) x0 is the velocity of the path from x0 to the noise along the angle whose
    cosine is sqrt(abar) (Salimans and Ho, 2022): flow matching's (FMRG, 2026), on a variance-preserving path. A
    flow-matching model gives its own.
    """
    if prediction_type == FLOW:
        change = strength * weight * lengths(output.float()) * directions(gradient)
        return change.to(gradient) if holds_signal(prediction_type, abar) else torch.zeros_like(gradient)
    noise = output_to_noise(output.float(), x_t.float(), prediction_type, abar)
    # sqrt(abar) v, so that nothing is divided by abar
    velocity = noise - (1 - abar).sqrt() * x_t
    change = strength * weight * lengths(velocity) * directions(gradient)
    return noise_to_output(change.to(gradient), prediction_type, abar)


def activation(feature: Tensor, gradient: Tensor, *, strength: float = 1.0, eta: float = 0.1) -> Tensor:
    """The change -eta * |h| * gradient / |gradient| of a tap's feature h, image by image.

    Args:
        feature: (k * B, C, h, w), of B images in k branches of text guidance.
        gradient: (B, C, h, w), the energy's at that feature.
    """
    moved = directions(gradient).repeat(len(feature) // len(gradient), 1, 1, 1)
    return -strength * eta * lengths(feature.float()) * moved


@dataclass(frozen=True)
class Transition:
    """What a scheduler makes of x_t: x_{t-1} = mean + sigma * noise, (B, C, h, w) both, in float32 or float64.

    abar, abar_previous: scalars, of x_t and of x_{t-1}. sigma: scalar, 0 where it adds no noise.
    """

    mean: Tensor
    noise: Tensor
    sigma: Tensor
    abar: Tensor
    abar_previous: Tensor

    @property
    def sample(self) -> Tensor:
        """x_{t-1} as the scheduler makes it."""
        return self.mean + self.sigma * self.noise

    @property
    def alpha(self) -> Tensor:
        """abar_t / abar_{t-1}, the share of signal that one step of noise leaves."""
        return self.abar / self.abar_previous


def dsg(gradient: Tensor, step: Transition, *, strength: float = 1.0, share: float = 0.4) -> Tensor:
    """x_{t-1} whose noise is turned towards the steepest descent and keeps its length (Yang et al., 2024, algorithm 1).

    With n numbers in a latent, d* = -sqrt(n) sigma g / |g| and d = sigma z: m = d + share (d* - d) and
    x_{t-1} = mean + sqrt(n) sigma m / |m|. Images whose gradient is zero keep the scheduler's step.

    Args:
        share: of the noise that the gradient replaces, in [0, 1].
    """
    radius = step.noise[0].numel() ** 0.5
    share = min(strength * share, 1.0)
    turned = step.noise + share * (-radius * directions(gradient) - step.noise)
    steered = step.mean + step.sigma * radius * directions(turned)
    return torch.where(lengths(gradient) * share > 0, steered, step.sample)


def freedom(gradient: Tensor, step: Transition, *, strength: float = 1.0, rho: float = 1.5) -> Tensor:
    """x_{t-1} - rho_t * gradient with rho_t = rho * (1 - abar_t / abar_{t-1}) (Yu et al., 2023, algorithm 1).

    Their rho_t is a free learning rate. Here it is the noise variance of the step, the weight that an energy has in the
    reverse diffusion (Dhariwal and Nichol, 2021, algorithm 1), so that all steps together move as far however many
    there are.
    """
    return step.sample - strength * rho * (1 - step.alpha) * gradient


def mpgd(gradient: Tensor, step: Transition, *, strength: float = 1.0, rate: float = 0.1) -> Tensor:
    """x_{t-1} for an x0 that descends the energy while the predicted noise stays (He et al., 2024, algorithm 1).

    x0 <- x0 - rate * dE/dx0, and x_{t-1} = sqrt(abar_{t-1}) x0 + ... moves by sqrt(abar_{t-1}) times that. A readout
    takes x0 as sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, which is x_t itself where the noise is the predicted one; with
    that noise held, as if the denoiser did not depend on x_t, dE/dx0 = sqrt(abar_t) dE/dx_t.
    """
    return step.sample - strength * rate * step.abar_previous.sqrt() * step.abar.sqrt() * gradient


def lengths(value: Tensor) -> Tensor:
    """Euclidean lengths of (B, C, h, w), image by image: (B, 1, 1, 1)."""
    return value.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def directions(value: Tensor) -> Tensor:
    """value / |value|, image by image; zero where it is zero."""
    length = lengths(value)
    return torch.where(length > 0, value / length, 0.0)


def alpha_bar(scheduler: SchedulerMixin, timestep: Tensor) -> Tensor:
    """abar_t of the coming step's timestep, scalar in [0, 1]; 1 / (1 + sigma^2) where the scheduler keeps sigmas, and
    (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2) in float64 where they are flow matching's.

    Sigmas come first, by the scheduler's own count of steps: fractional timesteps are in no table, and Karras spacing
    rounds several noise levels to one timestep.
    """
    if hasattr(scheduler, "sigmas_interpol"):  # KDPM2 calls the model between its sigmas too
        return type(scheduler).scale_model_input(scheduler, torch.ones(()), timestep) ** 2
    if not hasattr(scheduler, "sigmas"):
        return scheduler.alphas_cumprod[timestep.long().cpu()]
    index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
    if prediction_type(scheduler) == FLOW:
        if index is None:  # the nearest, as half precision rounds timesteps
            index = (scheduler.timesteps.to(timestep) - timestep).abs().argmin().item()
        noise = scheduler.sigmas[index].double()
        return (1 - noise) ** 2 / ((1 - noise) ** 2 + noise**2)
    if index is None:
        index = scheduler.index_for_timestep(timestep)
    return 1 / (1 + scheduler.sigmas[index] ** 2)


# What diffusers calls a model that predicts noise - x0; flow matching's own schedulers know of nothing else.
FLOW = "flow_prediction"


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What a scheduler takes the model's output for: "epsilon", "v_prediction", FLOW or another of diffusers'."""
    return scheduler.config.get("prediction_type", FLOW)


# abar below which x_t holds no signal to steer. Schedules of zero terminal SNR end in 0, or in 2^-24 where a scheduler
# keeps sigmas; others in 5e-3, and a hundred steps of such a schedule stay above 2e-5.
NO_SIGNAL = 1e-5
# The same of flow matching, in s: near 1 the factor 1 / (1 - s) makes much of what a readout sees in noise.
MOST_NOISE = 0.98


def noise_level(prediction_type: str, abar: Tensor) -> Tensor:
    """The factor of the noise in x_t, scalar: sqrt(1 - abar), or flow matching's s."""
    noise = (1 - abar).sqrt()
    return noise / (noise + abar.sqrt()) if prediction_type == FLOW else noise


def holds_signal(prediction_type: str, abar: Tensor) -> bool:
    """Whether a velocity at x_t is steered."""
    if prediction_type == FLOW:
        return bool(noise_level(prediction_type, abar) <= MOST_NOISE + 1e-6)
    return bool(abar > NO_SIGNAL)


def noise_to_output(delta: Tensor, prediction_type: str, abar: Tensor) -> Tensor:
    """A change of the noise prediction as a change of the model's output, at fixed x_t.

    v = (eps - sqrt(1 - abar) x_t) / sqrt(abar) (Salimans and Ho, 2022), so delta_v = delta_eps / sqrt(abar); flow
    matching's v = (eps - x_t) / (1 - s), so delta_v = delta_eps / (1 - s). Both are zero where x_t holds no signal.
    """
    if prediction_type == "epsilon":
        return delta
    if not holds_signal(prediction_type, abar):
        return torch.zeros_like(delta)
    return delta / (1 - noise_level(prediction_type, abar) if prediction_type == FLOW else abar.sqrt())


def output_to_noise(output: Tensor, x_t: Tensor, prediction_type: str, abar: Tensor) -> Tensor:
    """The noise prediction in a model's output at x_t: eps = sqrt(abar) v + sqrt(1 - abar) x_t, or x_t + (1 - s) v."""
    if prediction_type == FLOW:
        return x_t + (1 - noise_level(prediction_type, abar)) * output
    return output if prediction_type == "epsilon" else abar.sqrt() * output + (1 - abar).sqrt() * x_t
