"""Whole sampling runs of a tiny pipeline: against explicit loops, without guidance, and against each other."""

from contextlib import contextmanager

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

from rg.backbone.denoiser import embed_time, taps
from rg.backbone.diffusion import DiffusionBackbone
from rg.guidance.attach import SCHEDULERS as PROMISED
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget

SCHEDULERS = [DDIMScheduler, DDPMScheduler, PNDMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler]


@contextmanager
def recorded(pipe):
    """Every (input, output) of the denoiser, as the pipeline sees them."""
    calls = []
    handle = pipe.unet.register_forward_hook(lambda _m, given, output: calls.append((given[0], output[0])))
    yield calls
    handle.remove()


def test_ddim_and_euler_are_guided_alike(tiny_pipeline, tiny_head, poses, denoise):
    # Both integrate the same equation over the same noise levels: the denoiser sees the same x_t and gives the same.
    runs = []
    for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
        pipe = tiny_pipeline(scheduler=scheduler)
        guidance = ReadoutGuidance([GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1)))], readout_scale=300.0)
        with recorded(pipe) as calls:
            denoise(pipe, guidance, steps=6)
        runs.append((calls, guidance.trace))
    for (x, output), (same_x, same_output) in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(same_x, x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(same_output, output, rtol=1e-4, atol=1e-4)
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(one.delta_norm, other.delta_norm, rtol=1e-3, atol=0)
        assert one.timestep == other.timestep
    assert runs[0][1][0].delta_norm > 0.05


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scale_zero_is_no_guidance(
    tiny_pipeline, tiny_head, poses, denoise, scheduler, prediction_type, guidance_scale
):
    pipe = tiny_pipeline(scheduler=scheduler, prediction_type=prediction_type)
    head = tiny_head(pipe.unet)
    guidance = ReadoutGuidance([GuidanceTerm(head, FixedTarget(poses(2)))], readout_scale=0.0)
    plain = denoise(pipe, images=2, guidance_scale=guidance_scale)
    same = denoise(pipe, guidance, images=2, guidance_scale=guidance_scale)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)
    assert len(guidance.trace) == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("name", [name for name in PROMISED if getattr(diffusers, name) not in SCHEDULERS])
def test_every_promised_scheduler_runs_guided(tiny_pipeline, tiny_head, poses, denoise, name):
    pipe = tiny_pipeline(scheduler=getattr(diffusers, name))
    terms = [GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1)))]
    plain = denoise(pipe, steps=3)
    guidance = ReadoutGuidance(terms, readout_scale=0.0)
    # LCM divides by small numbers: the last bits of one batch less differ by 1.5e-5 on some processors.
    torch.testing.assert_close(denoise(pipe, guidance, steps=3), plain, rtol=1e-4, atol=1e-4)
    assert len(guidance.trace) == len(pipe.scheduler.timesteps)
    guided = denoise(pipe, ReadoutGuidance(terms, readout_scale=1.0, normalize="rms"), steps=3)
    assert guided.isfinite().all() and not torch.allclose(guided, plain, atol=1e-2)


@pytest.mark.parametrize(
    ("branch", "arguments", "read"),
    [
        ("uncond", {}, [""]),
        ("cond", {}, ["a person"]),
        ("both", {}, ["", "a person"]),
        ("uncond", {"negative_prompt": "grass"}, [""]),
        ("both", {"negative_prompt": "grass"}, ["grass", "a person"]),
        ("uncond", {"guidance_scale": 1.0}, [""]),
        ("cond", {"guidance_scale": 1.0}, ["a person"]),
    ],
)
def test_a_branch_is_read_under_its_condition_and_the_pipeline_keeps_its_own(
    tiny_pipeline, tiny_head, poses, denoise, branch, arguments, read
):
    pipe = tiny_pipeline()
    arguments = {"images": 2, "prompt": "a person"} | arguments
    if "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * 2
    captured = []

    def capture(features, time_embedding):
        captured.append(features[0])
        return features[0].flatten(1).sum(1)

    terms = [GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1))), GuidanceTerm(capture)]
    plain = denoise(pipe, **arguments)
    with recorded(pipe) as calls:
        same = denoise(pipe, ReadoutGuidance(terms, readout_scale=0.0, branch=branch), **arguments)
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)
    backbone = DiffusionBackbone(pipe)
    x, timestep = calls[0][0][:2], pipe.scheduler.timesteps[:1].expand(2)
    expected = torch.cat([backbone.predict(x, timestep, prompt).features[0] for prompt in read])
    torch.testing.assert_close(captured[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        *((scheduler, {"normalize": "rms", "readout_scale": 1.0}) for scheduler in SCHEDULERS),
        (DDIMScheduler, {"update": "adam", "learning_rate": 0.2}),
        (DDIMScheduler, {"update": "adam", "learning_rate": 0.2, "branch": "both"}),
    ],
)
def test_guidance_lowers_the_energy(tiny_pipeline, tiny_head, poses, denoise, scheduler, settings):
    pipe = tiny_pipeline(scheduler=scheduler)
    head = tiny_head(pipe.unet, time_convention="none")
    guidance = ReadoutGuidance([GuidanceTerm(head, FixedTarget(poses(2)))], **settings)
    measured = ReadoutGuidance(guidance.terms, readout_scale=0.0, branch=guidance.branch)
    denoise(pipe, measured, images=2, steps=12)
    denoise(pipe, guidance, images=2, steps=12)
    guided, unguided = guidance.trace[-1].energy, measured.trace[-1].energy
    torch.testing.assert_close(guidance.trace[0].energy, measured.trace[0].energy)
    assert (guided < guidance.trace[0].energy).all() and (guided < unguided).all()


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (DDIMScheduler, {"readout_scale": 300.0}),
        (DDPMScheduler, {"readout_scale": 0.5, "normalize": "rms"}),
        (EulerDiscreteScheduler, {"readout_scale": 300.0, "branch": "both"}),
    ],
)
def test_an_image_does_not_depend_on_its_neighbours(tiny_pipeline, tiny_head, poses, denoise, scheduler, settings):
    pipe = tiny_pipeline(scheduler=scheduler)
    head, targets = tiny_head(pipe.unet), poses(3)
    together = denoise(pipe, ReadoutGuidance([GuidanceTerm(head, FixedTarget(targets))], **settings), images=3)
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        start = torch.randn(1, 4, 8, 8, generator=generator)
        guidance = ReadoutGuidance([GuidanceTerm(head, FixedTarget(targets[i : i + 1]))], **settings)
        alone = denoise(pipe, guidance, latents=start, generator=[generator])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-4)
    same = ReadoutGuidance([GuidanceTerm(head, FixedTarget(targets[:1]))], **settings)
    repeated = ReadoutGuidance([GuidanceTerm(head, FixedTarget(targets[:1].expand(3, -1, -1, -1)))], **settings)
    assert torch.equal(denoise(pipe, same, images=3), denoise(pipe, repeated, images=3))
    assert not torch.allclose(denoise(pipe, same, images=3)[1], together[1], atol=1e-3)


@pytest.mark.parametrize("preset", [{}, {"branch": "uncond", "latent_range_factor": False}])
def test_adam_rule_is_the_explicit_loop(tiny_pipeline, tiny_head, poses, denoise, preset):
    # Algorithm: in the first half of the steps one step of a fresh Adam on x_t, then DDIM from the moved x_t.
    pipe = tiny_pipeline()
    head = tiny_head(pipe.unet, variant="rgb", control_range=(-1.0, 1.0))
    term = GuidanceTerm(head, FixedTarget(poses(2)), weight=1e3)
    guidance = ReadoutGuidance.preset("released", [term], **preset)
    guided = denoise(pipe, guidance, images=2, steps=6)

    unet, both = pipe.unet.requires_grad_(False), guidance.branch == "both"
    condition, empty = pipe.encode_prompt(["a person in a red shirt"] * 2, "cpu", 1, True)
    condition = torch.cat([empty, condition]).detach()
    features = []
    for tap in taps(unet).values():
        tap.register_forward_hook(lambda _m, _i, output: features.append(output))
    target = head.encode_target(poses(2), readout_size=(16, 16), image_size=(32, 32))
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        if step < 3:
            x = x.clone().requires_grad_()
            adam = torch.optim.Adam([x], lr=guidance.learning_rate)
            rows = torch.cat([x, x]) if both else x
            features.clear()
            unet(rows, timestep, condition[: len(rows)])
            readout = head(features, embed_time(unet, timestep.expand(len(rows))))
            energy = 1e3 * head.energy(readout, torch.cat([target, target]) if both else target)
            if guidance.latent_range_factor:
                energy = energy * ((rows.flatten(1).amax(1) - rows.flatten(1).amin(1)).detach() / 2) ** 2
            energy.sum().backward()
            adam.step()
            x = x.detach()
        with torch.no_grad():
            empty_noise, noise = unet(torch.cat([x, x]), timestep, condition).sample.chunk(2)
        x = pipe.scheduler.step(empty_noise + 2.0 * (noise - empty_noise), timestep, x).prev_sample
    assert len(guidance.trace) == 3
    torch.testing.assert_close(guided, x, rtol=0, atol=1e-5)


def test_the_pipelines_eta_reaches_the_scheduler_under_adam(tiny_pipeline, tiny_head, poses, denoise):
    pipe = tiny_pipeline()
    term = GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1)))
    guidance = ReadoutGuidance([term], update="adam", learning_rate=0.0)
    for eta in (0.0, 1.0):
        assert torch.allclose(denoise(pipe, guidance, eta=eta), denoise(pipe, eta=eta), atol=1e-5)
    assert not torch.allclose(denoise(pipe, guidance, eta=0.0), denoise(pipe, guidance, eta=1.0), atol=1e-2)
