from collections import Counter

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from rg.backbone.denoiser import embed_time
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.features import predict
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget

ANOTHER = "grass at dusk"


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


def deltas(pipe, denoise, guidance, **arguments):
    """What guidance added to the model's output at the first step, and the first x_t it was called with."""
    seen = []
    handle = pipe.unet.register_forward_hook(
        lambda _m, given, kwargs, output: seen.append((given[0], output[0])), with_kwargs=True
    )
    denoise(pipe, **arguments)
    denoise(pipe, guidance, **arguments)
    handle.remove()
    (x, plain), (same_x, guided) = seen[0], seen[len(seen) // 2]
    assert torch.equal(x, same_x)
    return guided - plain, x


@pytest.mark.parametrize("variant", ["keypoints", "rgb"])
def test_energy_gradient_through_the_unet(tiny_pipeline, tiny_head, poses, variant):
    unet = tiny_pipeline().unet.double().requires_grad_(False)
    head = tiny_head(unet, variant=variant, projection_dim=8, norm_groups=1).double()
    generator = torch.Generator().manual_seed(1)
    x, condition = torch.randn(1, 4, 4, 4, generator=generator), torch.randn(1, 5, 8, generator=generator)
    timestep = torch.tensor([300])
    target = head.encode_target(poses(1), readout_size=(8, 8), image_size=(32, 32)).double()

    def energy(x):
        features = predict(unet, x, timestep, encoder_hidden_states=condition.double()).features
        return head.energy(head(features, embed_time(unet, timestep)), target)

    assert torch.autograd.gradcheck(energy, x.double().requires_grad_())


def test_delta_is_the_true_gradient_of_the_energy(tiny_pipeline, tiny_head, poses, denoise):
    # Against central differences of the energy in float64, computed without the hook, along random directions.
    pipe = tiny_pipeline()
    head = tiny_head(pipe.unet)
    guidance = ReadoutGuidance([GuidanceTerm(head, FixedTarget(poses(1)))], readout_scale=100.0, branch="uncond")
    delta, x = deltas(pipe, denoise, guidance, steps=2)
    timestep = pipe.scheduler.timesteps[:1]
    gradient = delta[:1].double() / (100 * (1 - pipe.scheduler.alphas_cumprod[timestep]).sqrt())
    empty = pipe.encode_prompt("", "cpu", 1, False)[0].detach().double()
    unet, head = pipe.unet.double(), head.double()
    target = head.encode_target(poses(1), readout_size=(16, 16), image_size=(32, 32)).double()

    def energy(x):
        features = predict(unet, x, timestep, encoder_hidden_states=empty).features
        return head.energy(head(features, embed_time(unet, timestep)), target).item()

    directions = torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).double()
    with torch.no_grad():
        slopes = [(energy(x[:1] + 1e-6 * d) - energy(x[:1] - 1e-6 * d)) / 2e-6 for d in directions]
    projected = (directions * gradient).flatten(1).sum(1)
    torch.testing.assert_close(projected, torch.tensor(slopes).double(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rms_normalised_delta_is_relative_to_the_noise_prediction(tiny_pipeline, denoise, prediction_type):
    pipe = tiny_pipeline(prediction_type=prediction_type)
    terms = [GuidanceTerm(brightness)]
    guidance = ReadoutGuidance(terms, normalize="rms", readout_scale=0.3, branch="uncond")
    delta, x = deltas(pipe, denoise, guidance, images=2, steps=3)
    abar = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[0]]
    empty = pipe.encode_prompt("", "cpu", 1, False)[0].expand(2, -1, -1)
    with torch.no_grad():
        noise = pipe.unet(x[:2], pipe.scheduler.timesteps[0], encoder_hidden_states=empty).sample
    if prediction_type == "v_prediction":
        noise = abar.sqrt() * noise + (1 - abar).sqrt() * x[:2]
        delta = delta * abar.sqrt()
    expected = 0.3 * (1 - abar).sqrt() * noise.flatten(1).norm(dim=1)
    torch.testing.assert_close(delta[:2].flatten(1).norm(dim=1), expected, rtol=1e-4, atol=0)
    assert torch.allclose(delta[:2], delta[2:], atol=1e-6), "both halves of the batch move alike"
    raw, _ = deltas(pipe, denoise, ReadoutGuidance(terms, branch="uncond"), images=2, steps=3)
    assert torch.cosine_similarity(delta[:2].flatten(1), raw[:2].flatten(1)).min() > 0.999


def test_two_terms_add_up(tiny_pipeline, tiny_head, poses, denoise):
    pipe = tiny_pipeline()
    one, other = GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1)), 0.5), GuidanceTerm(brightness, weight=0.5)
    doubled = GuidanceTerm(one.head, one.target, 1.0)
    twice, once, both, alone = (
        deltas(pipe, denoise, ReadoutGuidance(terms, readout_scale=1e3, branch="uncond"), steps=2)[0]
        for terms in ([one, one], [doubled], [one, other], [other])
    )
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both, once / 2 + alone, rtol=1e-4, atol=1e-5)
    assert alone.abs().max() > 1e-2 and once.abs().max() > 1e-2


def test_latent_range_factor_scales_energies(tiny_pipeline, tiny_head, poses, denoise):
    pipe = tiny_pipeline()
    head = tiny_head(pipe.unet, variant="rgb", control_range=(-1.0, 1.0))
    energies = {}
    for factor in (False, True):
        guidance = ReadoutGuidance(
            [GuidanceTerm(head, FixedTarget(poses(1)))],
            readout_scale=0.0,
            latent_range_factor=factor,
            branch="uncond",
        )
        _, x = deltas(pipe, denoise, guidance, images=2, steps=2)
        energies[factor] = guidance.trace[0].energy
    span = x[:2].flatten(1).amax(1) - x[:2].flatten(1).amin(1)
    torch.testing.assert_close(energies[True], energies[False] * (span / 2) ** 2)


def test_checkpointing_recomputes_and_changes_nothing(tiny_pipeline, tiny_head, poses, denoise):
    pipe = tiny_pipeline()
    images, calls = {}, Counter()
    for checkpointing in (False, True):
        term = GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1)))
        guidance = ReadoutGuidance([term], readout_scale=300.0, checkpointing=checkpointing, branch="uncond")
        block = pipe.unet.up_blocks[0].resnets[0]
        handle = block.register_forward_pre_hook(lambda *_, key=checkpointing: calls.update([key]))
        images[checkpointing] = denoise(pipe, guidance)
        handle.remove()
    torch.testing.assert_close(images[True], images[False], rtol=0, atol=1e-5)
    assert calls == {False: 2 * 4, True: 3 * 4}


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("time_convention", ["direct", "mirrored", "none"])
def test_training_sampling_and_evaluation_read_the_same(
    tiny_pipeline, tiny_head, poses, denoise, scheduler, time_convention
):
    pipe = tiny_pipeline(scheduler=scheduler)
    backbone = DiffusionBackbone(pipe)
    head = tiny_head(pipe.unet, time_convention=time_convention)
    captured = []

    def spy(features, time_embedding):
        captured.append((features, time_embedding))
        return brightness(features, time_embedding)

    pipe.scheduler.set_timesteps(4)
    timesteps = pipe.scheduler.timesteps[:1].long().expand(2)
    clean, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x_t = backbone.add_noise(clean, noise, timesteps)
    guidance = ReadoutGuidance(
        [GuidanceTerm(head, FixedTarget(poses(1))), GuidanceTerm(spy)],
        readout_scale=0.0,
        keep_readouts=True,
        branch="uncond",
    )
    denoise(pipe, guidance, images=2, latents=x_t)
    features, time_embedding = captured[0]
    predicted = backbone.predict(x_t, timesteps).features
    for seen, expected in zip(features, predicted, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(time_embedding, backbone.embed_time(timesteps))
    torch.testing.assert_close(
        guidance.trace[0].readouts[0], head.attach_backbone(backbone).readout(clean, noise, timesteps)
    )
    assert [len(step.readouts) for step in guidance.trace] == [2] * 4


@pytest.mark.parametrize(
    ("settings", "arguments", "calls", "condition"),
    [
        # settings, pipeline arguments, row forwards / of them with gradient / row backwards, per image and step
        ({}, {}, (2, 1, 1), "shared"),
        ({"branch": "cond"}, {}, (2, 1, 1), "shared"),
        ({"branch": "both"}, {}, (2, 2, 2), "shared"),
        ({}, {"negative_prompt": [ANOTHER] * 2}, (3, 1, 1), "own"),
        ({}, {"guidance_scale": 1.0}, (2, 1, 1), "own"),
        ({}, {"guidance_scale": 1.0, "prompt": ""}, (1, 1, 1), "shared"),
        ({"branch": "cond"}, {"guidance_scale": 1.0}, (1, 1, 1), "shared"),
        ({"update": "adam"}, {}, (3, 1, 1), "shared"),
        ({"update": "adam", "branch": "both"}, {}, (4, 2, 2), "shared"),
        ({"update": "adam"}, {"negative_prompt": [ANOTHER] * 2}, (3, 1, 1), "own"),
        ({"stop": 0.0}, {}, (2, 0, 0), None),
    ],
)
def test_cost_of_a_step(tiny_pipeline, tiny_head, poses, denoise, settings, arguments, calls, condition):
    pipe = tiny_pipeline()
    term = GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(1)))
    guidance = ReadoutGuidance([term], **{"branch": "uncond", **settings})
    rows = Counter()

    def count(_module, given):
        rows["forward"] += len(given[0])
        if given[0].requires_grad:
            rows["gradient"] += len(given[0])
            given[0].register_hook(lambda gradient: rows.update({"backward": len(gradient)}))

    pipe.unet.conv_in.register_forward_pre_hook(count)
    denoise(pipe, guidance, images=2, steps=3, **arguments)
    assert tuple(rows[name] / 2 / 3 for name in ("forward", "gradient", "backward")) == calls
    assert {step.condition for step in guidance.trace} == ({condition} if condition else set())
