from contextlib import nullcontext

import pytest
import torch

from rg.backbone.denoiser import denoiser_of
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.features import predict
from rg.guidance.energy import PEAK, Reading, energy_and_gradient, gradient_at
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from tests.families import FLOW_MODELS, MODELS, build, denoise, is_flow, mostly_slow

# Families whose runs in half precision are fast tests, of those without flow matching.
OFTEN = ("sd15", "sdxl", "sdxl_adapter", "pixart")


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


def gradient_of(pipe, head, weight=1.0, scaled=True):
    """The energy's gradient at one fixed x_t, by the parts that the guided step is made of; or by plain autograd."""
    denoiser = denoiser_of(pipe).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(denoiser.dtype).requires_grad_()
    timestep = torch.tensor(500)
    inputs = DiffusionBackbone(pipe).condition("").inputs(2, (32, 32), x.detach())
    prediction = predict(denoiser, x, timestep, **inputs)
    if not scaled:
        features = prediction.features
        (gradient,) = torch.autograd.grad(weight * head([f.float() for f in features], None).sum(), x)
        return gradient.float()
    reading = Reading(
        x=x,
        latent=x.detach(),
        output=prediction.output.detach(),
        features=prediction.features,
        timestep=timestep,
        step=0,
        images=2,
        image_size=(32, 32),
        denoiser=denoiser,
        num_timesteps=1000,
        rows=slice(0, 2),
        shared=True,
    )
    return energy_and_gradient([GuidanceTerm(head, weight=weight)], reading)[1]


def cosine(one, other):
    return torch.cosine_similarity(one.flatten(1), other.flatten(1)).min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", [*MODELS, *FLOW_MODELS])
def test_gradient_in_half_precision_is_that_in_float32(tokenizer, model, dtype):
    exact = gradient_of(build(model, tokenizer), brightness)
    half = build(model, tokenizer, dtype=dtype)
    gradient = gradient_of(half, brightness)
    assert gradient.dtype == torch.float32 and cosine(gradient, exact) > 0.99
    torch.testing.assert_close(gradient.norm(), exact.norm(), rtol=0.05, atol=0)
    # As small as the energies of large images' readouts are: float16 alone loses the gradient altogether.
    for weight in (1e-6, 1e6):
        assert cosine(gradient_of(half, brightness, weight), gradient) > 0.99
    if dtype == torch.float16:
        assert (gradient_of(half, brightness, 1e-6, scaled=False) == 0).float().mean() > 0.5


def test_gradient_in_float32_is_autograds(tokenizer):
    pipe = build("sdxl", tokenizer)
    torch.testing.assert_close(gradient_of(pipe, brightness), gradient_of(pipe, brightness, scaled=False))


def test_a_row_that_overflows_backs_off_and_leaves_its_neighbours_alone():
    x = torch.ones(2, 1, 2, 2, dtype=torch.float16, requires_grad=True)
    gain = torch.tensor([1.0, 6e4]).half().view(2, 1, 1, 1)
    slopes = torch.tensor([2.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert not (gain * PEAK).isfinite().all()
    gradient = gradient_at(x, [x * gain], [slopes])
    torch.testing.assert_close(gradient, slopes * gain.float(), rtol=1e-2, atol=0)


def test_what_overflows_at_every_scale_stays_not_finite():
    x = torch.ones(2, 1, 1, 1, dtype=torch.float16, requires_grad=True)
    gain = torch.tensor([1.0, float("inf")]).half().view(2, 1, 1, 1)
    gradient = gradient_at(x, [x * gain], [torch.ones(2, 1, 1, 1)]).flatten()
    assert gradient[0] == 1 and not gradient[1].isfinite()


def test_features_that_nothing_depends_on_are_named():
    x = torch.ones(1, 1, 1, 1, requires_grad=True)
    with pytest.raises(ValueError, match="an energy that depends on the features, got a constant"):
        gradient_at(x, [x * 2], [None])
    with pytest.raises(ValueError, match="no gradient reaches its input from its taps"):
        gradient_at(x, [torch.ones(1, 1, 1, 1, requires_grad=True) * 2], [torch.ones(1, 1, 1, 1)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", mostly_slow([*OFTEN, *FLOW_MODELS], (*OFTEN, "sana")))
def test_guided_runs_in_half_precision(tokenizer, family, dtype):
    pipe = build(family, tokenizer, dtype=dtype)
    terms, steps = [GuidanceTerm(brightness)], 6 if is_flow(family) else 3
    plain = denoise(pipe, family, steps=steps)
    zero = ReadoutGuidance(terms, readout_scale=0.0)
    torch.testing.assert_close(denoise(pipe, family, zero, steps=steps), plain, rtol=0.02, atol=0.05)
    rules = [{"normalize": "rms", "readout_scale": 1.0}]
    for settings in rules if is_flow(family) else [*rules, {"update": "adam", "learning_rate": 0.3}]:
        guidance = ReadoutGuidance(terms, **settings)
        assert denoise(pipe, family, guidance, steps=steps).isfinite().all()
        assert (guidance.trace[-1].energy < zero.trace[-1].energy).all()


def test_heads_stay_in_float32_under_autocast(tokenizer, tiny_head):
    pipe = build("sd15", tokenizer)
    kinds = []

    def spy(features, time_embedding):
        kinds.append((features[0].dtype, (features[0].flatten(1) @ features[0].flatten(1).T).dtype))
        return brightness(features, time_embedding)

    with torch.autocast("cpu", torch.bfloat16):
        denoise(pipe, "sd15", ReadoutGuidance([GuidanceTerm(spy)]), steps=2)
    assert set(kinds) == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_an_autoencoder_that_overflows_is_named_instead_of_black_images(tokenizer, family):
    pipe = build(family, tokenizer)
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0)
    denoise(pipe, family, guidance, steps=2, output_type="pt")
    with torch.no_grad():
        pipe.vae.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="vae: expected finite images, its decoder overflows in torch.float32"):
        denoise(pipe, family, guidance, steps=2, output_type="pt")
    assert not pipe.vae.decoder._forward_hooks
    images = torch.zeros(1, 3, 32, 32)
    backbone = DiffusionBackbone(pipe)
    with pytest.raises(FloatingPointError, match="vae: expected finite values"):
        backbone.decode(backbone.encode(images)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("model", [*MODELS, *FLOW_MODELS])
def test_a_half_precision_backbone_keeps_its_autoencoder_in_float32(tokenizer, model, dtype):
    exact, half = DiffusionBackbone(build(model, tokenizer)), DiffusionBackbone(build(model, tokenizer, dtype=dtype))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = half.encode(images)
    assert half.vae.dtype == torch.float32 and mean.dtype == std.dtype == half.decode(mean).dtype == torch.float32
    x_t, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([30, 700])
    one, other = exact.predict(x_t, timesteps), half.predict(x_t, timesteps)
    for sharp, rough in zip([one.output, *one.features], [other.output, *other.features], strict=True):
        assert rough.dtype == torch.float32 and cosine(sharp, rough) > 0.99
    assert half.embed_time(timesteps).dtype == torch.float32
    # The pipeline itself decodes its half-precision latents with it.
    assert denoise(half.pipeline, model, steps=2, output_type="pt").isfinite().all()


def test_black_images_of_float16_are_an_error_unless_the_pipeline_upcasts(tokenizer):
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0)
    for family, fails in (("sd15", True), ("sdxl", False)):  # SDXL's pipeline heeds vae.config.force_upcast
        pipe = build(family, tokenizer, dtype=torch.float16)
        with torch.no_grad():
            pipe.vae.decoder.conv_out.weight.fill_(6e4)
        with pytest.raises(FloatingPointError, match="overflows in torch.float16") if fails else nullcontext():
            assert denoise(pipe, family, guidance, steps=2, output_type="pt").isfinite().all()
        # Under a backbone the same autoencoder runs in float32.
        backbone = DiffusionBackbone(pipe)
        assert denoise(backbone.pipeline, family, guidance, steps=2, output_type="pt").isfinite().all()
