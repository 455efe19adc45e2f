"""Where a sampling run is: which step it is at, and what guidance knows of its images since the run began."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rg.backbone.denoiser import denoiser_of
from rg.backbone.families import family_of
from rg.guidance.updates import alpha_bar


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
        near = max(0.5, now * family_of(denoiser_of(self.pipe)).time_rounding())
        self.coming = [times[1:] for times in self.coming if times and abs(times[0] - now) < near]
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

    def has_signal(self, window: tuple[float, float] | None, sample: Tensor, timestep: Tensor) -> bool:
        """Whether SNR(t) * h * w of latents (B, C, h, w), see `signal`, lies in a window [low, high); None: always."""
        if window is None:
            return True
        low, high = window
        return low <= signal(alpha_bar(self.pipe.scheduler, timestep), sample) < high


def signal(abar: Tensor, sample: Tensor) -> float:
    """SNR times the number of the latents' places: what a pattern of the image's own size stands out by.

    With SNR = abar / (1 - abar) (Kingma et al., 2021). Twice as many pixels a side average four times as many values:
    the same structures then come out of the noise at a quarter of the SNR (Hoogeboom et al., 2023, section 2.3).
    """
    abar = abar.double()
    return (abar / (1 - abar)).item() * sample.shape[-2] * sample.shape[-1]


class Images:
    """The images of one sampling run: how large their first gradient was, and which of them are left alone by now."""

    def __init__(self) -> None:
        self.size: Tensor | None = None
        self.energy: Tensor | None = None
        self.settled: Tensor | None = None

    @property
    def all_settled(self) -> bool:
        """Whether none is steered any more."""
        return self.settled is not None and bool(self.settled.all())

    def settle(self, energy: Tensor, enough: float | None) -> Tensor:
        """Which images are steered (B,): not those whose energy (B,) has once fallen to `enough` of the first read."""
        if self.energy is None:
            self.energy, self.settled = energy, torch.zeros_like(energy, dtype=torch.bool)
        if enough is not None:
            self.settled = self.settled | (energy <= enough * self.energy)
        return ~self.settled

    def in_units(self, gradient: Tensor) -> Tensor:
        """A gradient g (B, C, h, w) over sqrt(RMS(g) RMS(g_1)), of each image and its first one, g_1.

        Without a unit, then, whatever head, weight, number of latents and precision the energy comes from: of RMS 1 at
        first, and later sqrt(RMS(g) / RMS(g_1)). Over RMS(g) alone a step would be as long where nothing is left to be
        done; over RMS(g_1) alone heads whose gradient falls fast would hardly steer.
        """
        size = gradient.flatten(1).square().mean(1).sqrt()
        self.size = size if self.size is None else torch.where(self.size > 0, self.size, size)
        return gradient / (size * self.size).sqrt().clamp_min(1e-30).view(-1, 1, 1, 1)
