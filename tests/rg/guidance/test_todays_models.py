"""Other pipelines of flow-matching models, and models whose text encoders are too large to be built tiny: they are
called with embeddings."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from rg.backbone.denoiser import denoiser_of, taps
from rg.backbone.families import family_of
from rg.backbone.features import predict
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from tests.families import build
from tests.modular import WIDTHS, flux2_autoencoder, flux2_transformer, qwen_autoencoder, qwen_transformer

IMAGE = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
PROMPTS = {"prompt": ["a person", "grass"], "guidance_scale": 2.0, "height": 32, "width": 32}
EMBEDDED = ("flux2", "klein", "qwen")


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


def sd3_controlnet():
    sizes = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "pooled_projection_dim": 16}
    sizes |= {"joint_attention_dim": 18, "caption_projection_dim": 24, "pos_embed_max_size": 16}
    return diffusers.SD3ControlNetModel(sample_size=8, in_channels=4, out_channels=4, **sizes)


def flux_controlnet():
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12}
    sizes |= {"joint_attention_dim": 14, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 4)}
    return diffusers.FluxControlNetModel(in_channels=16, guidance_embeds=True, **sizes)


def embedded(kind):
    """A pipeline without a text encoder, and what its call takes: images of another height than width."""
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"scheduler": schedule, "text_encoder": None, "tokenizer": None}
    generator = torch.Generator().manual_seed(1)
    given = {"prompt_embeds": torch.randn(2, 5, WIDTHS["qwen" if kind == "qwen" else "flux2"], generator=generator)}
    if kind == "qwen":
        parts |= {"vae": qwen_autoencoder(), "transformer": qwen_transformer()}
        given |= {"prompt_embeds_mask": torch.ones(2, 5, dtype=torch.long), "height": 64, "width": 32}
        return diffusers.QwenImagePipeline(**parts), given
    parts |= {"vae": flux2_autoencoder(), "transformer": flux2_transformer(guidance_embeds=kind == "flux2")}
    made = diffusers.Flux2Pipeline(**parts) if kind == "flux2" else diffusers.Flux2KleinPipeline(**parts)
    given |= {"height": 48, "width": 32, "guidance_scale": 4.0 if kind == "flux2" else 1.0}
    return made, given


def pipeline(kind, tokenizer):
    if kind in EMBEDDED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe, given = embedded(kind)
        denoiser_of(pipe).eval()
        return pipe, given
    model, _, use = kind.partition("_")
    parts = dict(build(model, tokenizer).components)
    torch.manual_seed(0)
    if use == "controlnet":
        parts["controlnet"] = (sd3_controlnet if model == "sd3" else flux_controlnet)().eval()
    name = {"img2img": "Img2Img", "inpaint": "Inpaint", "controlnet": "ControlNet"}[use]
    family = {"sd3": "StableDiffusion3", "flux": "Flux"}[model]
    given = {
        "img2img": {"image": [IMAGE] * 2, "strength": 0.8},
        "inpaint": {"image": IMAGE, "mask_image": Image.new("L", (32, 32), 255), "strength": 0.8},
        "controlnet": {"control_image": [IMAGE] * 2},
    }[use]
    return getattr(diffusers, f"{family}{name}Pipeline")(**parts), PROMPTS | given


def run(pipe, given, guidance=None):
    given = {"num_inference_steps": 5, "output_type": "latent", "generator": torch.Generator().manual_seed(0)} | given
    pipe.set_progress_bar_config(disable=True)
    if guidance is None:
        return pipe(**given).images
    with guidance.attach(pipe):
        return pipe(**given).images


def traces(pipe):
    parts = [part for part in denoiser_of(pipe).modules() if part._forward_hooks or "forward" in vars(part)]
    return parts, hasattr(denoiser_of(pipe), "_diffusers_hook"), sorted(vars(pipe)), sorted(vars(pipe.scheduler))


SLOW = ("sd3_controlnet", "flux_img2img", "flux_controlnet", "klein")
KINDS = ("sd3_img2img", "flux_inpaint", *EMBEDDED, *SLOW[:3])


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k in SLOW else k for k in KINDS])
def test_strength_zero_is_plain_sampling_and_more_lowers_the_energy(tokenizer, kind):
    pipe, given = pipeline(kind, tokenizer)
    plain, before = run(pipe, given), traces(pipe)
    energies = []
    for strength in (0.0, 0.5):
        guidance = ReadoutGuidance([GuidanceTerm(brightness)], strength=strength, update="velocity_norm")
        guided = run(pipe, given, guidance)
        assert torch.allclose(guided, plain, rtol=1e-4, atol=1e-4) == (strength == 0)
        energies.append(guidance.trace[-1].energy)
    assert (energies[1] < energies[0]).all()
    assert traces(pipe) == before


@pytest.mark.parametrize("kind", ["klein", "qwen"])
def test_text_guidance_by_a_second_call_is_refused_and_the_pipeline_is_left_as_it_was(tokenizer, kind):
    pipe, given = pipeline(kind, tokenizer)
    plain = run(pipe, given)
    other = {"negative_prompt_embeds": given["prompt_embeds"].flip(0)}
    if kind == "qwen":
        other |= {"negative_prompt_embeds_mask": given["prompt_embeds_mask"], "true_cfg_scale": 4.0}
    else:
        other["guidance_scale"] = 4.0
    before = traces(pipe)
    with pytest.raises(ValueError, match=r"scale: expected 1 or no negative prompt, got 4\.0.*twice a step.*Guider"):
        run(pipe, given | other, ReadoutGuidance([GuidanceTerm(brightness)]))
    assert traces(pipe)[:2] == before[:2]
    torch.testing.assert_close(run(pipe, given), plain)


@pytest.mark.parametrize("kind", ["flux2", "qwen"])
def test_tokens_lie_as_the_pipelines_pack_them(tokenizer, kind):
    pipe, _ = pipeline(kind, tokenizer)
    latents, family = torch.randn(2, 4, 6, 10), family_of(pipe.transformer)
    if kind == "qwen":
        packed = pipe._pack_latents(latents, 2, 4, 6, 10)
        places = {"img_shapes": [[(1, 3, 5)]] * 2}
    else:
        whole = pipe._patchify_latents(latents)
        packed = pipe._pack_latents(whole)
        places = {"img_ids": pipe._prepare_latent_ids(whole), "txt_ids": None}
    assert torch.equal(family.packed(latents), packed)
    assert torch.equal(family.unpacked(packed, dict(places)), latents)
    made = family.places(3, 5, latents, 7)
    if kind == "flux2":
        assert torch.equal(made["img_ids"], places["img_ids"][0])
        assert torch.equal(made["txt_ids"], pipe._prepare_text_ids(torch.zeros(1, 7, 2))[0])
    else:
        assert made == places
    with pytest.raises(ValueError, match="expected 3x5 tokens as their ids say, got 30: .* second image"):
        family.unpacked(torch.cat([packed, packed], 1), dict(places))


@pytest.mark.parametrize("kind", ["flux2", "qwen"])
def test_a_map_holds_no_tokens_of_the_text(tokenizer, kind):
    pipe, given = pipeline(kind, tokenizer)
    seen = []
    handles = [
        tap.register_forward_hook(lambda _t, _i, out: seen.append(out)) for tap in taps(pipe.transformer).values()
    ]
    sample, time = torch.randn(2, 4, 6, 10), torch.full((2,), 500.0)
    found = predict(pipe.transformer, sample, time, encoder_hidden_states=given["prompt_embeds"])
    for handle in handles:
        handle.remove()
    assert found.output.shape == sample.shape and len(found.features) == len(seen) == (4 if kind == "flux2" else 3)
    for output, feature in zip(seen, found.features, strict=True):
        tokens = output[1] if isinstance(output, tuple) else output[:, 5:]
        assert torch.equal(feature, tokens.transpose(1, 2).unflatten(2, (3, 5)))


@pytest.mark.parametrize("kind", ["flux2", "qwen"])
def test_activation_steering_moves_the_images_tokens(tokenizer, kind):
    pipe, given = pipeline(kind, tokenizer)
    # Of a block of one stream in Flux 2; what comes behind the last block does not see a feature's length.
    guidance = ReadoutGuidance([GuidanceTerm(lambda features, _: features[-2][:, 0].mean((1, 2)))], update="activation")
    guided = run(pipe, given, guidance)
    assert guided.isfinite().all() and not torch.allclose(guided, run(pipe, given), atol=1e-4)


def test_sana_sprint_is_refused(tokenizer):
    pipe = diffusers.SanaSprintPipeline(**build("sana", tokenizer).components | {"scheduler": diffusers.SCMScheduler()})
    with (
        pytest.raises(ValueError, match="expected one that makes images from text, got a SanaSprintPipeline"),
        ReadoutGuidance([GuidanceTerm(brightness)]).attach(pipe),
    ):
        pass


def test_a_saved_image_to_image_pipeline_is_guided_as_before(tokenizer, tmp_path):
    pipe, given = pipeline("sd3_img2img", tokenizer)
    guided = run(pipe, given, ReadoutGuidance([GuidanceTerm(brightness)], strength=0.5))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.StableDiffusion3Img2ImgPipeline.from_pretrained(tmp_path)
    again = run(loaded, given, ReadoutGuidance([GuidanceTerm(brightness)], strength=0.5))
    torch.testing.assert_close(again, guided, rtol=1e-4, atol=1e-4)
