import inspect

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from rg.guidance.attach import SCHEDULERS, check_scheduler, shift_scheduler_input
from rg.guidance.updates import alpha_bar, noise_to_output, output_to_noise

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
DETERMINISTIC = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "ddim-trailing": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),
    "pndm-runge-kutta": (PNDMScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "euler-linspace": (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    "euler-karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
}


def make(scheduler, **changes):
    return scheduler.from_config({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        *((name, "epsilon") for name in DETERMINISTIC),
        # PNDM averages raw predictions, and v is not constant on a straight path as noise is.
        *((name, "v_prediction") for name in DETERMINISTIC if not name.startswith("pndm")),
    ],
)
@pytest.mark.parametrize("steps", [10, 50])
def test_alpha_bar_is_the_noise_level_of_the_sample_that_the_denoiser_sees(name, prediction_type, steps):
    # With the true x0 and noise as the prediction, every deterministic solver stays on
    # x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise; two elements, (x0, noise) = (1, 0) and (0, 1), show both factors.
    scheduler, changes = DETERMINISTIC[name]
    scheduler = make(scheduler, **changes, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    x0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    noise, first = 1 - x0, scheduler.timesteps[0]
    abar = alpha_bar(scheduler, first).double()
    sample = torch.stack([abar, 1 - abar]).sqrt() / scheduler.scale_model_input(torch.ones(1), first)
    for timestep in scheduler.timesteps:
        abar = alpha_bar(scheduler, timestep).double()
        expected = torch.stack([abar, 1 - abar]).sqrt()
        seen = scheduler.scale_model_input(sample, timestep)
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)
        output = noise if prediction_type == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"num_train_timesteps": 200}) for name in SCHEDULERS),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True, "num_train_timesteps": 200}),
    ],
)
def test_abar_is_that_of_every_sample_which_a_promised_scheduler_gives_the_model(name, changes):
    # Also of those that add noise or call the model twice a step: what it is given has mean sqrt(abar_t) x0 and
    # variance 1 - abar_t, if it predicts the true noise; x0 = 1.
    scheduler, generator = make(getattr(diffusers, name), **changes), torch.Generator().manual_seed(0)
    check_scheduler(scheduler, "score")
    scheduler.set_timesteps(8)
    first, noise = scheduler.timesteps[0], torch.randn(1, 1, 200, 200, generator=generator)
    abar = alpha_bar(scheduler, first)
    x = (abar.sqrt() + (1 - abar).sqrt() * noise) / scheduler.scale_model_input(torch.ones(1), first)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep)
        abar = alpha_bar(scheduler, timestep)
        assert seen.mean() ** 2 == pytest.approx(abar.item(), abs=0.015)
        assert seen.var() == pytest.approx(1 - abar.item(), abs=0.02)
        output = (seen - abar.sqrt()) / (1 - abar).sqrt()
        given = {"generator": generator} if takes_generator else {}
        x = scheduler.step(output, timestep, x, return_dict=False, **given)[0]


def test_karras_spacing_repeats_timesteps_at_different_noise_levels():
    # What makes the case above with 50 steps hard: the timestep alone does not tell the level.
    scheduler = make(DPMSolverMultistepScheduler, use_karras_sigmas=True)
    scheduler.set_timesteps(50)
    assert len(scheduler.timesteps.unique()) < 50 and len(scheduler.sigmas[:-1].unique()) == 50


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
def test_alpha_bar_is_that_of_add_noise(scheduler):
    scheduler = make(scheduler)
    scheduler.set_timesteps(20)
    for timestep in scheduler.timesteps:
        signal = scheduler.add_noise(torch.ones(1), torch.zeros(1), timestep[None])
        noise = scheduler.add_noise(torch.zeros(1), torch.ones(1), timestep[None])
        torch.testing.assert_close(alpha_bar(scheduler, timestep), signal[0] ** 2)
        torch.testing.assert_close(1 - alpha_bar(scheduler, timestep), noise[0] ** 2)


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_alpha_bar_of_a_run_that_starts_late(scheduler):
    scheduler = make(scheduler, use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(6)
    expected = 1 / (1 + scheduler.sigmas[6] ** 2)
    assert alpha_bar(scheduler, scheduler.timesteps[6]) == expected


def test_ddim_and_euler_agree_on_the_noise_level():
    ddim, euler = make(DDIMScheduler), make(EulerDiscreteScheduler, timestep_spacing="leading")
    ddim.set_timesteps(10)
    euler.set_timesteps(10)
    assert ddim.timesteps.tolist() == euler.timesteps.tolist()
    for one, other in zip(ddim.timesteps, euler.timesteps, strict=True):
        torch.testing.assert_close(alpha_bar(ddim, one), alpha_bar(euler, other))


def test_v_prediction_and_noise_prediction_change_together():
    generator = torch.Generator().manual_seed(0)
    x_t, eps, delta = torch.randn(3, 1, 2, 2, 2, generator=generator).double()
    for abar in (torch.tensor(0.9).double(), torch.tensor(0.02).double()):
        v = (eps - (1 - abar).sqrt() * x_t) / abar.sqrt()
        torch.testing.assert_close(output_to_noise(v, x_t, "v_prediction", abar), eps)
        moved = v + noise_to_output(delta, "v_prediction", abar)
        torch.testing.assert_close(output_to_noise(moved, x_t, "v_prediction", abar), eps + delta)
        assert torch.equal(noise_to_output(delta, "epsilon", abar), delta)
        assert torch.equal(output_to_noise(eps, x_t, "epsilon", abar), eps)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_without_signal_a_v_prediction_is_left_alone(scheduler, karras):
    scheduler = make(scheduler, rescale_betas_zero_snr=True, timestep_spacing="trailing", use_karras_sigmas=karras)
    scheduler.set_timesteps(50)
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    abar = alpha_bar(scheduler, scheduler.timesteps[0])
    assert torch.equal(noise_to_output(torch.ones(1, 2), "v_prediction", abar), torch.zeros(1, 2))
    for level in 10.0 ** torch.linspace(-10, 0, 50):
        assert noise_to_output(torch.ones(1), "v_prediction", level).item() < 320


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler])
def test_schedulers_with_a_rule_pass(scheduler):
    for prediction_type in ("epsilon", "v_prediction"):
        check_scheduler(make(scheduler, prediction_type=prediction_type), "score")


def test_schedulers_without_a_rule_are_named():
    others = {name for name in dir(diffusers) if name.endswith("Scheduler") and name not in SCHEDULERS}
    assert {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "DPMSolverSDEScheduler"} <= others
    for name in others:
        kind = getattr(diffusers, name)
        with pytest.raises(ValueError, match=rf"variance-preserving one of .*DDIMScheduler.*, got {name}$"):
            check_scheduler(object.__new__(kind), "score")
    with pytest.raises(ValueError, match="use_flow_sigmas=False, got True: DPMSolverMultistepScheduler"):
        check_scheduler(make(DPMSolverMultistepScheduler, use_flow_sigmas=True), "score")
    with pytest.raises(ValueError, match=r"prediction_type is 'sample', expected one of \('epsilon', 'v_prediction'\)"):
        check_scheduler(make(DDIMScheduler, prediction_type="sample"), "score")
    with pytest.raises(ValueError, match="DDIMScheduler, got EulerDiscreteScheduler; use update=score"):
        check_scheduler(make(EulerDiscreteScheduler), "adam")
    check_scheduler(make(DDIMScheduler), "adam")


@pytest.mark.parametrize("wrapped_before", [False, True])
def test_shift_scheduler_input_move_the_step_and_leave_no_trace(wrapped_before):
    scheduler = make(DDIMScheduler, clip_sample=False)
    scheduler.set_timesteps(5)
    if wrapped_before:
        scheduler.step = scheduler.step
    before = {key: id(value) for key, value in vars(scheduler).items()}
    output, sample, move = torch.rand(3, 1, 1, 2, 2)
    timestep, moves = scheduler.timesteps[1], [move, None]
    expected = [scheduler.step(output, timestep, x).prev_sample for x in (sample + move, sample)]
    with pytest.raises(KeyboardInterrupt), shift_scheduler_input(scheduler, lambda: moves.pop(0)):
        for wanted in expected:
            assert torch.equal(scheduler.step(output, timestep, sample, return_dict=False)[0], wanted)
        raise KeyboardInterrupt
    # Unlike dict equality this never compares tensors by value.
    assert {key: id(value) for key, value in vars(scheduler).items()} == before
