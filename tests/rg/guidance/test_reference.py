"""References: recorded once, compared with step by step, from generated images and from real ones."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from rg.backbone.denoiser import denoiser_of
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import MIRRORED, invert
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import ReferenceTarget
from rg.heads.protocol import EnergyHead, FunctionHead
from tests.families import MODELS, build, denoise, mostly_slow


class Look(EnergyHead):
    """A relative head: the finest tap is the readout, the energy its mean distance in angle; or one point's."""

    prompt = ""

    def __call__(self, features: list[Tensor], time_embedding: Tensor) -> Tensor:
        return features[-1]

    def energy(self, readout: Tensor, target: Tensor, *, points: Tensor | None = None) -> Tensor:
        if points is not None:
            column, row = points.unbind(-1)
            readout = torch.stack([r[:, y, x, None] for r, y, x in zip(readout, row, column, strict=True)])
        return (1 - F.cosine_similarity(readout, target, dim=1)).flatten(1).mean(1)


def starts(count, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("branch", ["uncond", "cond", "both"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl_controlnet", "pixart"])
def test_recording_changes_nothing_and_the_same_run_is_at_distance_zero(tokenizer, family, branch):
    pipe = build(family, tokenizer)
    reference = ReferenceTarget()
    guidance = ReadoutGuidance([GuidanceTerm(Look(), reference)], branch=branch, readout_scale=0.0)
    plain = denoise(pipe, family)
    with guidance.record(pipe):
        torch.testing.assert_close(denoise(pipe, family), plain, rtol=1e-5, atol=1e-5)
    assert not hasattr(denoiser_of(pipe), "_diffusers_hook")
    readout = 24 * 4 * 4 if family == "pixart" else 8 * 8 * 8
    assert reference.nbytes == 4 * (4 * 2 * readout) * (2 if branch == "both" else 1)
    denoise(pipe, family, guidance)
    assert len(guidance.trace) == 4
    assert all((step.energy.abs() < 1e-5).all() for step in guidance.trace)
    # Any number of runs: another image is at some distance, and guidance makes it smaller.
    denoise(pipe, family, guidance, generator=[torch.Generator().manual_seed(9)] * 2)
    far = guidance.trace[-1].energy
    strong = ReadoutGuidance(guidance.terms, branch=branch, readout_scale=1.0, normalize="rms")
    denoise(pipe, family, strong, generator=[torch.Generator().manual_seed(9)] * 2)
    assert (far > 0.01).all() and (strong.trace[-1].energy < far).all()


def test_a_reference_row_in_the_batch_gives_the_same_energy(tokenizer):
    # As the authors compute it: the reference is another row of the same call, at every step.
    pipe = build("sd15", tokenizer)
    latents, reference = starts(2), ReferenceTarget()
    seen = []

    def beside(features, time_embedding):
        seen.append(Look().energy(features[-1][1:], features[-1][:1]))
        return features[-1].flatten(1).sum(1) * 0

    terms = [GuidanceTerm(FunctionHead(beside, prompt=""))]
    denoise(pipe, "sd15", ReadoutGuidance(terms, readout_scale=0.0), latents=latents)
    guidance = ReadoutGuidance([GuidanceTerm(Look(), reference)], readout_scale=0.0)
    prompts = ["a person in a red shirt", "grass at dusk"]
    with guidance.record(pipe):
        denoise(pipe, "sd15", images=1, latents=latents[:1], prompt=prompts[:1])
    denoise(pipe, "sd15", guidance, images=1, latents=latents[1:], prompt=prompts[1:])
    for step, expected in zip(guidance.trace, seen, strict=True):
        torch.testing.assert_close(step.energy, expected, rtol=1e-4, atol=1e-5)


def test_one_reference_for_many_images_and_only_the_vectors_that_the_energy_reads(tokenizer):
    pipe = build("sd15", tokenizer)
    points = torch.tensor([[2, 5]])
    whole = ReferenceTarget()
    vectors = ReferenceTarget(keep=lambda readout: readout[:, :, 5, 2, None])
    guidance = ReadoutGuidance(
        [GuidanceTerm(Look(), whole), GuidanceTerm(Look(), vectors, arguments={"points": points})],
        readout_scale=0.0,
        branch="both",
    )
    with guidance.record(pipe):
        denoise(pipe, "sd15", images=1)
    assert whole.nbytes == 64 * vectors.nbytes
    denoise(pipe, "sd15", guidance, images=3)
    assert guidance.trace[0].energy.shape == (3,) and guidance.trace[0].energy[0].abs() < 1e-5
    three = {"points": torch.tensor([[2, 5], [1, 1], [7, 7]])}
    guidance.terms[1] = GuidanceTerm(Look(), vectors, arguments=three)
    denoise(pipe, "sd15", guidance, images=3)
    guidance.terms[1] = GuidanceTerm(Look(), vectors, arguments={"points": three["points"][:2]})
    with pytest.raises(ValueError, match="arguments: expected 1 or 3 of them, one per image, got 2"):
        denoise(pipe, "sd15", guidance, images=3)


def test_a_reference_of_another_run_is_named(tokenizer):
    pipe = build("sd15", tokenizer)
    reference = ReferenceTarget()
    guidance = ReadoutGuidance([GuidanceTerm(Look(), reference)], readout_scale=0.0, stop=0.5)
    with pytest.raises(
        ValueError, match=r"expected one recorded at step 0 \(t=751\), got \[\]: run `with guidance.record"
    ):
        denoise(pipe, "sd15", guidance)
    with guidance.record(pipe):
        denoise(pipe, "sd15")
    with pytest.raises(ValueError, match=r"reference: expected step 0 at t=751 as it was recorded, got t=801"):
        denoise(pipe, "sd15", guidance, steps=5)
    guidance.stop = 1.0
    with pytest.raises(ValueError, match=r"expected one recorded at step 2 \(t=251\), got \[0, 1\]"):
        denoise(pipe, "sd15", guidance)
    with pytest.raises(ValueError, match="expected 1 or 3 of them, one per image, got 2"):
        denoise(pipe, "sd15", guidance, images=3)
    guidance.branch, guidance.stop = "both", 0.5
    with pytest.raises(ValueError, match="reference: expected 2 branches as guided, got 1"):
        denoise(pipe, "sd15", guidance)
    nothing = ReadoutGuidance([GuidanceTerm(Look())])
    with pytest.raises(ValueError, match="with a ReferenceTarget to record, got none"), nothing.record(pipe):
        pass


@pytest.mark.slow
def test_steps_that_share_a_timestep_are_told_apart(tokenizer):
    pipe = build("sd15", tokenizer, scheduler=DPMSolverMultistepScheduler)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    reference = ReferenceTarget()
    guidance = ReadoutGuidance([GuidanceTerm(Look(), reference)], readout_scale=0.0)
    with guidance.record(pipe):
        denoise(pipe, "sd15", steps=50)
    assert len(pipe.scheduler.timesteps.unique()) < 50
    denoise(pipe, "sd15", guidance, steps=50)
    assert len(guidance.trace) == 50 and all((step.energy.abs() < 1e-4).all() for step in guidance.trace)


@pytest.mark.parametrize("family", ["sd15_img2img", "sdxl_img2img"])
def test_a_shortened_run_counts_its_own_steps(tokenizer, family):
    pipe = build(family, tokenizer, scheduler=EulerDiscreteScheduler)
    guidance = ReadoutGuidance([GuidanceTerm(Look(), ReferenceTarget())], readout_scale=0.0, stop=0.5)
    with guidance.record(pipe):
        denoise(pipe, family, steps=10)
    denoise(pipe, family, guidance, steps=10)
    assert [step.step for step in guidance.trace] == [0, 1, 2, 3]
    assert all((step.energy.abs() < 1e-5).all() for step in guidance.trace)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", mostly_slow(MODELS, ("sd15",)))
def test_a_real_image_is_inverted_recorded_and_guides(tokenizer, model, dtype):
    pipe = build(model, tokenizer, dtype=dtype)
    with torch.no_grad():
        last = pipe.transformer.proj_out if model == "pixart" else pipe.unet.conv_out
        last.weight *= 0.02  # random weights say something else at every step: nothing could invert them
    backbone = DiffusionBackbone(pipe)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = backbone.encode(image)[0]
    latents = latents / latents.std()
    again, prompt = {"images": 1, "steps": 50, "guidance_scale": 1.0, "eta": 0.0}, "grass at dusk"
    noise = invert(backbone, latents, num_inference_steps=50, prompt=prompt)
    assert noise.dtype == dtype and not torch.allclose(noise.float(), latents, atol=0.1)
    reference = ReferenceTarget()
    guidance = ReadoutGuidance([GuidanceTerm(Look(), reference)], readout_scale=0.5, normalize="rms")
    with guidance.record(pipe):
        back = denoise(pipe, model, **again, prompt=[prompt], latents=noise)
    error = (back - latents).norm() / latents.norm()
    assert error < 0.1, error
    others = {"images": 2, "steps": 50, "latents": starts(2).to(dtype)}
    unguided = ReadoutGuidance(guidance.terms, readout_scale=0.0)
    for each in (unguided, guidance):
        denoise(pipe, model, each, **others)
    assert (guidance.trace[-1].energy < unguided.trace[-1].energy).all()


def test_inversion_is_exact_where_the_noise_prediction_is_constant(tokenizer):
    pipe = build("sd15", tokenizer)
    with torch.no_grad():
        pipe.unet.conv_out.weight.zero_()
        pipe.unet.conv_out.bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.5]))
    latents = starts(2)
    noise = invert(DiffusionBackbone(pipe), latents, num_inference_steps=20)
    back = denoise(pipe, "sd15", steps=20, guidance_scale=1.0, latents=noise)
    torch.testing.assert_close(back, latents, rtol=1e-4, atol=1e-4)
    # The closed form: x_T = sqrt(abar_T / abar_0) x_0 + (sqrt(1 - abar_T) - sqrt(abar_T (1 - abar_0) / abar_0)) eps.
    abar = pipe.scheduler.alphas_cumprod[[0, int(pipe.scheduler.timesteps[0])]]
    eps = pipe.unet.conv_out.bias.detach().view(1, 4, 1, 1)
    expected = (abar[1] / abar[0]).sqrt() * (latents - (1 - abar[0]).sqrt() * eps) + (1 - abar[1]).sqrt() * eps
    torch.testing.assert_close(noise, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MIRRORED)
def test_the_schedulers_that_inversion_mirrors_lead_back(tokenizer, name):
    pipe = build("sd15", tokenizer)
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.02)  # as above
    latents, backbone = starts(2), DiffusionBackbone(pipe)
    # As a user makes it: its settings say nothing of clipping, or carry what another scheduler did.
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    clips = {} if "DDIM" not in name else {"clip_sample": False}
    pipe.scheduler = getattr(diffusers, name)(**schedule, **clips)
    if pipe.scheduler.config.get("timestep_spacing") == "linspace":
        pipe.scheduler.register_to_config(timestep_spacing="leading")
    noise = invert(backbone, latents, num_inference_steps=20)
    back = denoise(pipe, "sd15", steps=20, guidance_scale=1.0, latents=noise, prompt=["", ""])
    assert (back - latents).norm() / latents.norm() < 0.06


def test_schedules_without_an_inverse_are_named(tokenizer):
    backbone = DiffusionBackbone(build("sd15", tokenizer))
    with pytest.raises(ValueError, match="num_inference_steps: expected 1 to 1000, got 0"):
        invert(backbone, starts(1), num_inference_steps=0)
    with pytest.raises(FloatingPointError, match="expected finite noise after 2 steps"):
        invert(backbone, starts(1) * float("nan"), num_inference_steps=2)
    noisy = {"DDPMScheduler": {}, "EulerAncestralDiscreteScheduler": {}, "LCMScheduler": {}}
    noisy |= {"DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"}}
    own = backbone.pipeline.scheduler
    for name, settings in noisy.items():
        backbone.pipeline.scheduler = getattr(diffusers, name).from_config(own.config, **settings)
        with pytest.raises(ValueError, match=settings.get("algorithm_type", rf"{name} does not lead .*DDIMScheduler")):
            invert(backbone, starts(1), num_inference_steps=2)
    for settings in ({"clip_sample": True}, {"thresholding": True}):
        backbone.pipeline.scheduler = type(own).from_config(own.config, **settings)
        with pytest.raises(ValueError, match=f"expected {next(iter(settings))}=False, got True"):
            invert(backbone, starts(1), num_inference_steps=2)
    backbone.pipeline.scheduler = own
    backbone.pipeline.scheduler.register_to_config(timestep_spacing="linspace")
    with pytest.raises(ValueError, match=r"timestep_spacing of \('leading', 'trailing'\), got 'linspace'"):
        invert(backbone, starts(1), num_inference_steps=2)
