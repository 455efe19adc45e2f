"""Flow matching: the rules against closed forms on Gaussian data, its schedulers, and what is refused."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.families import family_of
from rg.guidance.attach import check_scheduler
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.rules import Repeats
from rg.guidance.updates import FLOW, alpha_bar, noise_level, output_to_noise, score, velocity_norm
from tests.families import build, denoise, mostly_slow

# x0 ~ N(0, 1), and an observation y = x0 + SPREAD * noise of it.
SEEN, SPREAD = 0.7, 0.5


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


def velocity(x, s, mean=0.0, variance=1.0):
    """E[noise - x0 | x_s = x] of x0 ~ N(mean, variance) and x_s = (1 - s) x0 + s noise."""
    total = (1 - s) ** 2 * variance + s**2
    left = x - (1 - s) * mean
    return s / total * left - (mean + (1 - s) * variance / total * left)


def energy_gradient(x, s):
    """Of -log p(y | x_s = x), by autograd: given x_s, x0 is Gaussian, and y is x0 with noise on top."""
    x = x.clone().requires_grad_()
    total = (1 - s) ** 2 + s**2
    spread = s**2 / total + SPREAD**2
    energy = (SEEN - (1 - s) / total * x) ** 2 / (2 * spread)
    return torch.autograd.grad(energy.sum(), x)[0]


def share_of_signal(s):
    return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)


@pytest.mark.parametrize("s", [0.01, 0.3, 0.5, 0.9, 0.98])
def test_the_score_rule_is_bayes_rule(s):
    s, x = torch.tensor(s, dtype=torch.float64), torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 1, 2, 2)
    plain, abar = velocity(x, s), share_of_signal(s)
    change = score(energy_gradient(x, s), plain, x, abar, scale=1.0, prediction_type=FLOW)
    shrunk = 1 / (1 + SPREAD**2)  # x0 given y is N(shrunk y, shrunk SPREAD^2)
    torch.testing.assert_close(plain + change, velocity(x, s, shrunk * SEEN, shrunk * SPREAD**2))
    torch.testing.assert_close(noise_level(FLOW, abar), s)
    torch.testing.assert_close(output_to_noise(plain, x, FLOW, abar), x + (1 - s) * plain)
    torch.testing.assert_close(change, s / (1 - s) * energy_gradient(x, s))


def test_nothing_is_steered_where_x_t_is_noise():
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    for s, steered in ((0.98, True), (0.981, False), (1.0, False)):
        abar = share_of_signal(torch.tensor(s, dtype=torch.float64))
        for change in (
            score(x, x, x, abar, scale=1.0, prediction_type=FLOW),
            velocity_norm(x, x, x, abar, prediction_type=FLOW),
        ):
            assert change.isfinite().all() and bool(change.any()) == steered


def test_velocity_norm_is_a_share_of_the_velocity_along_the_gradient():
    gradient, output = torch.randn(2, 1, 4, 4).double(), torch.randn(2, 1, 4, 4).double()
    abar = share_of_signal(torch.tensor(0.4, dtype=torch.float64))
    change = velocity_norm(gradient, output, output, abar, prediction_type=FLOW, strength=2.0, weight=0.25)
    lengths = [value.flatten(1).norm(dim=1).view(2, 1, 1, 1) for value in (output, gradient)]
    torch.testing.assert_close(change, 0.5 * lengths[0] * gradient / lengths[1])


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_guided_sampling_draws_from_the_posterior(kind):
    scheduler = kind(shift=3.0)
    scheduler.set_timesteps(400)
    noise = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 1, 2, 2)
    x = noise
    for timestep in scheduler.timesteps:
        abar = alpha_bar(scheduler, timestep)
        s = noise_level(FLOW, abar)
        assert abs(s * 1000 - timestep) < 1e-3
        change = score(energy_gradient(x, s), x, x, abar, scale=1.0, prediction_type=FLOW)
        x = scheduler.step((velocity(x, s) + change), timestep, x).prev_sample
    shrunk = 1 / (1 + SPREAD**2)
    # The flow maps Gaussians linearly; the first steps, above s = 0.98, know nothing of y.
    torch.testing.assert_close(x, shrunk * SEEN + shrunk**0.5 * SPREAD * noise, rtol=0, atol=0.02)


FLOWING = {"use_flow_sigmas": True, "prediction_type": FLOW, "flow_shift": 3.0}
SCHEDULERS = {
    "heun": FlowMatchHeunDiscreteScheduler(shift=3.0),
    "dynamic": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "dpm": DPMSolverMultistepScheduler(**FLOWING),
    "unipc": UniPCMultistepScheduler(**FLOWING),
}


@pytest.mark.parametrize("name", mostly_slow(SCHEDULERS, ("heun", "dynamic")))
def test_flow_schedulers(tokenizer, name):
    pipe = build("sd3", tokenizer)
    pipe.scheduler = SCHEDULERS[name]
    levels = []

    def keep(pipe, _step, timestep, given):
        levels.append(timestep.item())
        return given

    unguided = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0)
    plain = denoise(pipe, "sd3", steps=8)
    unmoved = denoise(pipe, "sd3", unguided, steps=8, callback_on_step_end=keep)
    torch.testing.assert_close(unmoved, plain, rtol=1e-4, atol=1e-4)
    assert [step.timestep for step in unguided.trace] == pytest.approx(levels)
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], strength=0.2)
    denoise(pipe, "sd3", guidance, steps=8)
    assert (guidance.trace[-1].energy < unguided.trace[-1].energy).all()
    steered = [step.delta_norm.any().item() for step in guidance.trace]
    assert steered == [timestep <= 980 for timestep in levels]


def test_rules_of_the_schedulers_step_are_refused(tokenizer):
    pipe = build("sd3", tokenizer)
    for update in ("adam", "dsg", "freedom", "mpgd"):
        guidance = ReadoutGuidance([GuidanceTerm(brightness)], update=update)
        words = f"update={update} is defined for DDIMScheduler, got FlowMatchEulerDiscreteScheduler; use update=score"
        with pytest.raises(ValueError, match=words), guidance.attach(pipe):
            pass
    with pytest.raises(ValueError, match="repeats are defined for DDIMScheduler, got FlowMatchEuler"):
        ReadoutGuidance([GuidanceTerm(brightness)], repeats=Repeats()).attach(pipe).__enter__()


def test_schedulers_without_a_rule_are_refused():
    for scheduler in (
        DDIMScheduler(),
        DPMSolverMultistepScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
    ):
        with pytest.raises(ValueError, match=f"flow-matching one.*got {type(scheduler).__name__}"):
            check_scheduler(scheduler, "score", flow=True)
    with pytest.raises(ValueError, match="invert_sigmas=False"):
        check_scheduler(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "score", flow=True)
    with pytest.raises(ValueError, match="variance-preserving.*got FlowMatchHeun"):
        check_scheduler(FlowMatchHeunDiscreteScheduler(), "score")


@pytest.mark.parametrize("update", ["velocity_norm", "activation"])
def test_other_rules_move_a_flow(tokenizer, update):
    pipe = build("sd3", tokenizer)
    plain, guidance = denoise(pipe, "sd3"), ReadoutGuidance([GuidanceTerm(brightness)], update=update)
    guided = denoise(pipe, "sd3", guidance)
    assert guided.isfinite().all() and not torch.allclose(guided, plain, atol=1e-3)
    for step in guidance.trace:
        assert (step.delta_norm > 0).all() or step.timestep > 980


def test_training_noise_is_the_line_from_x0_to_the_noise(tokenizer):
    backbone = DiffusionBackbone(build("sd3", tokenizer))
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    noisy = backbone.add_noise(latents, noise, torch.tensor([0, 250, 999]))
    torch.testing.assert_close(noisy[0], latents[0])
    torch.testing.assert_close(noisy[1], 0.75 * latents[1] + 0.25 * noise[1])
    assert backbone.pipeline.scheduler.scale_noise(latents[2:], torch.tensor([1000.0]), noise[2:]).equal(noise[2:])


def test_calls_of_flux_without_a_rule_are_refused_and_the_pipeline_is_left_alone(tokenizer):
    pipe = build("flux", tokenizer)
    plain, guidance = denoise(pipe, "flux", steps=2), ReadoutGuidance([GuidanceTerm(brightness)])
    with pytest.raises(ValueError, match=r"true_cfg_scale: expected 1 .*, got 2\.0: .* twice a step"):
        denoise(pipe, "flux", guidance, negative_prompt=["sand"] * 2, true_cfg_scale=2.0)
    assert torch.equal(denoise(pipe, "flux", steps=2), plain)
    places = torch.tensor([[0.0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])  # of a picture and of a second one
    with pytest.raises(ValueError, match="latents: expected 1x2 tokens as their ids say, got 4"):
        family_of(pipe.transformer).unpacked(torch.zeros(1, 4, 16), {"img_ids": places, "txt_ids": None})


def test_tokens_of_flux_lie_as_its_pipeline_packs_them(tokenizer):
    pipe, latents = build("flux", tokenizer), torch.randn(2, 4, 6, 10)
    family, packed = family_of(pipe.transformer), pipe._pack_latents(latents, *latents.shape)
    assert torch.equal(family.packed(latents), packed)
    ids = {"img_ids": pipe._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32), "txt_ids": None}
    assert torch.equal(family.unpacked(packed, ids), latents)
