"""Whole sampling runs against the closed forms that Gaussian data has."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from torch import nn

from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.heads.protocol import EnergyHead

MEAN, SPREAD, CENTRE = 0.7, 0.4, -1.5


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact denoiser of data N(MEAN, SPREAD^2), in float64; its one tap gives its input.

    For x_t = a x0 + s noise: E[noise | x_t] = s (x_t - a MEAN) / (a^2 SPREAD^2 + s^2).
    """

    @register_to_config
    def __init__(self, prediction_type, in_channels=4, out_channels=4, sample_size=8, time_cond_proj_dim=None):
        super().__init__()
        block, resnet = nn.Module(), nn.Module()
        resnet.conv2, self.up_blocks = nn.Identity(), nn.ModuleList([block])
        block.resnets = nn.ModuleList([resnet])
        self.register_buffer("abar", torch.zeros(1000, dtype=torch.float64))

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **others):
        x, abar = self.up_blocks[0].resnets[0].conv2(sample), self.abar[timestep.long()].view(-1, 1, 1, 1)
        noise = (1 - abar).sqrt() * (x - abar.sqrt() * MEAN) / (abar * SPREAD**2 + 1 - abar)
        v = (noise - (1 - abar).sqrt() * x) / abar.sqrt()
        return (noise if self.config.prediction_type == "epsilon" else v,)


class Quadratic(EnergyHead):
    """The energy |x_t - CENTRE|^2 / 2, whose gradient is x_t - CENTRE."""

    def time_index(self, timesteps, num_timesteps):
        return None

    def __call__(self, features, time_embedding):
        return (features[0] - CENTRE).square().flatten(1).sum(1) / 2


@pytest.fixture
def gaussian(tiny_pipeline):
    def build(scheduler=DDIMScheduler, prediction_type="epsilon"):
        pipe = tiny_pipeline(scheduler=scheduler, prediction_type=prediction_type)
        pipe.unet = GaussianDenoiser(prediction_type)
        pipe.unet.abar.copy_(pipe.scheduler.alphas_cumprod)
        return pipe

    return build


START = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def levels(scheduler):
    """abar at every executed step of DDIM, then after the last one."""
    return [*scheduler.alphas_cumprod[scheduler.timesteps].double(), scheduler.final_alpha_cumprod.double()]


@contextmanager
def recorded(pipe):
    """Every (input, output) of the denoiser, as the pipeline sees them."""
    calls = []
    handle = pipe.unet.register_forward_hook(lambda _m, given, output: calls.append((given[0], output[0])))
    yield calls
    handle.remove()


def test_unguided_ddim_in_closed_form(gaussian, denoise):
    # With y_t = x_t - a_t MEAN one step is y' = y (a' a SPREAD^2 + s' s) / (a^2 SPREAD^2 + s^2).
    pipe = gaussian()
    y = denoise(pipe, latents=START, steps=7) - pipe.scheduler.final_alpha_cumprod.sqrt() * MEAN
    abar = torch.stack(levels(pipe.scheduler))
    a, s = abar.sqrt(), (1 - abar).sqrt()
    factors = (a[1:] * a[:-1] * SPREAD**2 + s[1:] * s[:-1]) / (abar[:-1] * SPREAD**2 + 1 - abar[:-1])
    torch.testing.assert_close(y, (START - a[0] * MEAN) * factors.prod(), rtol=1e-5, atol=1e-6)
    # Many steps approach the exact flow between the two Gaussians: deviations shrink as their spreads do.
    y = denoise(pipe, latents=START, steps=500) - pipe.scheduler.final_alpha_cumprod.sqrt() * MEAN
    abar = torch.stack(levels(pipe.scheduler))
    spread = (abar * SPREAD**2 + 1 - abar).sqrt()
    torch.testing.assert_close(y, (START - abar[0].sqrt() * MEAN) * spread[-1] / spread[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_score_guided_ddim_in_closed_form(gaussian, denoise, prediction_type, guidance_scale):
    pipe, scale = gaussian(prediction_type=prediction_type), 0.3
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], readout_scale=scale)
    with recorded(pipe) as calls:
        final = denoise(pipe, guidance, latents=START, steps=7, guidance_scale=guidance_scale)
    x, abars = START, levels(pipe.scheduler)
    for (seen, output), step, abar, after in zip(calls, guidance.trace, abars[:-1], abars[1:], strict=True):
        a, s = abar.sqrt(), (1 - abar).sqrt()
        gradient = x - CENTRE
        noise = s * (x - a * MEAN) / (abar * SPREAD**2 + s**2) + scale * s * gradient
        torch.testing.assert_close(seen, x.repeat(len(seen) // 2, 1, 1, 1), rtol=1e-5, atol=1e-5)
        predicted = output[:2] if prediction_type == "epsilon" else a * output[:2] + s * seen[:2]
        torch.testing.assert_close(predicted, noise, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(step.energy, gradient.square().flatten(1).sum(1).float() / 2)
        torch.testing.assert_close(step.gradient_norm, gradient.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
        x = after.sqrt() * (x - s * noise) / a + (1 - after).sqrt() * noise
    torch.testing.assert_close(final, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalize", [None, "rms"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_noise_and_v_prediction_of_one_model_are_guided_alike(gaussian, denoise, scheduler, normalize):
    finals = []
    for prediction_type in ("epsilon", "v_prediction"):
        guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], readout_scale=0.3, normalize=normalize)
        finals.append(denoise(gaussian(scheduler, prediction_type), guidance, latents=START))
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-4)


def test_without_signal_a_v_prediction_is_not_guided(gaussian, denoise):
    pipe = gaussian(prediction_type="v_prediction")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe.unet.abar.copy_(pipe.scheduler.alphas_cumprod.clamp_min(1e-12))
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())])
    final = denoise(pipe, guidance, latents=START)
    assert guidance.trace[0].timestep == 999 and pipe.scheduler.alphas_cumprod[999] == 0
    assert guidance.trace[0].delta_norm.tolist() == [0, 0] and min(guidance.trace[1].delta_norm) > 0
    assert final.isfinite().all()
