"""Guidance on tiny pipelines of every family: what it adds, what it reads, and that it leaves nothing behind."""

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler

from rg.backbone.denoiser import denoiser_of
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.families import family_of
from rg.backbone.features import predict, select_rows
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget
from rg.guidance.updates import alpha_bar
from rg.heads.protocol import FunctionHead
from rg.heads.spatial import SpatialHead
from tests.families import FAMILIES, FLOW_MODELS, MODELS, build, denoise, is_flow, mostly_slow

RMS = {"normalize": "rms", "readout_scale": 1.0}
# Families of a model that is tested anyway, and those whose many sizes and batches are fast tests.
VARIANTS = ("sd35", "flux_schnell")
SIZED = ("sd15", "sdxl_controlnet", "pixart")


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


def calls_of(pipe):
    """A list that gets (sample, timestep, other arguments, output) of every call that the pipeline makes."""
    calls = []
    family, ids = family_of(denoiser_of(pipe)), {}

    def before(_module, given, others):
        sample = given[0] if given else others["hidden_states"]
        others = select_rows(others, slice(None), len(sample))
        others.pop("hidden_states", None)
        timestep = given[1] if len(given) > 1 else others.pop("timestep")
        ids.update({name: others[name] for name in ("img_ids", "txt_ids") if name in others})
        sample = family.unpacked(sample.clone(), others)
        calls.append([sample, family.scheduler_time(torch.as_tensor(timestep)), others])

    def after(_module, _given, output):
        calls[-1].append(family.unpacked(output[0], dict(ids)))

    handles = [
        denoiser_of(pipe).register_forward_pre_hook(before, with_kwargs=True),
        denoiser_of(pipe).register_forward_hook(after),
    ]
    return calls, handles


def traces(pipe):
    """What an attachment could leave behind on any part of a pipeline."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    modules = {
        (key, name): (
            sorted(vars(module)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            getattr(module, "gradient_checkpointing", 0),
            module._compiled_call_impl,
            vars(module).get("forward"),
        )
        for key, part in parts.items()
        for name, module in part.named_modules()
    }
    flags = {(key, name): p.requires_grad for key, part in parts.items() for name, p in part.named_parameters()}
    names = sorted(vars(pipe)), sorted(vars(pipe.scheduler))
    return modules, flags, names, {key: id(part) for key, part in parts.items()}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES))
def test_scale_zero_is_plain_sampling_and_nothing_is_left_behind(tokenizer, family):
    pipe = build(family, tokenizer)
    plain, before = denoise(pipe, family), traces(pipe)
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0, branch="uncond")
    torch.testing.assert_close(denoise(pipe, family, guidance), plain, rtol=1e-5, atol=1e-5)
    assert guidance.trace
    broken = ReadoutGuidance(
        [GuidanceTerm(lambda features, _: brightness(features, _) * float("nan"))], branch="uncond"
    )
    with pytest.raises(FloatingPointError):
        denoise(pipe, family, broken)
    assert traces(pipe) == before
    assert torch.equal(denoise(pipe, family), plain)


@pytest.mark.parametrize("family", mostly_slow(FAMILIES))
def test_what_is_added_is_the_gradient_of_the_energy(tokenizer, family):
    # Both branches: rows, residuals and extra input channels as the pipeline itself gives them; no call of one's own.
    pipe = build(family, tokenizer)
    calls, handles = calls_of(pipe)
    # Flow matching's first step is left alone: it has no signal.
    first, steps = (1, 3) if is_flow(family) else (0, 2)
    denoise(pipe, family, steps=steps)
    count = len(calls)
    denoise(pipe, family, ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=1e3, branch="both"), steps=steps)
    for handle in handles:
        handle.remove()
    (sample, timestep, others, plain), (_, _, _, guided) = calls[first], calls[count + first]
    denoiser = denoiser_of(pipe).requires_grad_(False)
    x = sample.clone().requires_grad_()
    features = predict(denoiser, x, timestep, **others).features
    gradient = torch.autograd.grad(brightness(features, None).sum(), x)[0][:, :4].unflatten(0, (-1, 2)).sum(0)
    if is_flow(family):
        noise = timestep / 1000
        expected = 1e3 * noise / (1 - noise) * gradient
    else:
        abar = pipe.scheduler.alphas_cumprod[timestep]
        expected = 1e3 * (1 - abar).sqrt() * gradient
        if pipe.scheduler.config.prediction_type == "v_prediction":
            expected = expected / abar.sqrt()
    assert expected.abs().max() > 0.01
    delta = expected.repeat(len(sample) // 2, 1, 1, 1).float()
    torch.testing.assert_close((guided - plain)[:, :4], delta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(guided[:, 4:], plain[:, 4:])  # PixArt's variance


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(pytest.param(family, RMS, marks=[pytest.mark.slow] * (family in VARIANTS)) for family in FAMILIES),
        *((family, {"update": "adam", "learning_rate": 0.3}) for family in ("sd21", "sdxl", "sdxl_adapter", "pixart")),
        *((family, {"update": "adam", "learning_rate": 0.3, "branch": "both"}) for family in ("sd15_inpaint",)),
        ("pixart", {"normalize": "rms", "checkpointing": True}),
    ],
)
def test_the_guided_energy_falls(tokenizer, family, settings):
    pipe = build(family, tokenizer)
    unguided = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0, branch=settings.get("branch", "uncond"))
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], **{"branch": "uncond", **settings})
    denoise(pipe, family, unguided, steps=6)
    denoise(pipe, family, guidance, steps=6)
    torch.testing.assert_close(guidance.trace[0].energy, unguided.trace[0].energy)
    assert (guidance.trace[-1].energy < unguided.trace[-1].energy).all()


@pytest.mark.parametrize("family", mostly_slow([*MODELS, *FLOW_MODELS, "sdxl_controlnet", "sd15_adapter"], SIZED))
@pytest.mark.parametrize(
    "changes",
    [
        {"size": (32, 48)},
        {"images": 1, "size": (48, 32)},
        {"images": 3},
        {"negative_prompt": ["sand", "grass"]},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2, "generator": None, "latents": torch.randn(4, 4, 8, 8)},
    ],
    ids=lambda changes: next(reversed(changes)),
)
def test_sizes_batches_and_prompts(tokenizer, tiny_head, family, changes):
    pipe = build(family, tokenizer)
    if family == "sana" and "size" in changes:  # its pipeline takes multiples of 32 alone
        changes = changes | {"size": tuple(side // 48 * 64 or 32 for side in changes["size"])}
    steps = 3 if is_flow(family) else 2  # of two, one has no signal and the other no noise
    head = tiny_head(denoiser_of(pipe), variant="rgb", time_convention="mirrored")
    height, width = changes.get("size", (32, 32))
    control = FixedTarget(torch.rand(1, 3, height, width) * 2 - 1)
    guidance = ReadoutGuidance([GuidanceTerm(head, control)], readout_scale=0.0, keep_readouts=True, branch="uncond")
    plain = denoise(pipe, family, steps=steps, **changes)
    torch.testing.assert_close(denoise(pipe, family, guidance, steps=steps, **changes), plain, rtol=1e-5, atol=1e-5)
    readout = guidance.trace[-1].readouts[0]
    # Pixels: two cells per latent of 4x4 pixels, or per patch of 2x2 latents.
    cell = 2 * family_of(denoiser_of(pipe)).patch()
    assert readout.shape == (len(plain), 3, height // cell, width // cell)
    assert guidance.trace[-1].energy.shape == (len(plain),) and len(guidance.trace) == steps
    strong = ReadoutGuidance([GuidanceTerm(head, control)], normalize="rms", readout_scale=0.5, branch="uncond")
    assert not torch.allclose(denoise(pipe, family, strong, steps=steps, **changes), plain, atol=1e-2)


@pytest.mark.parametrize(
    ("family", "arguments", "condition"),
    [
        ("sd21", {}, "shared"),
        ("sd21", {"negative_prompt": ["sand"] * 2}, "own"),
        # SDXL zeroes the embedding of an absent negative prompt, and encodes an empty one.
        ("sdxl", {}, "own"),
        ("sdxl", {"negative_prompt": [""] * 2}, "shared"),
        ("sdxl", {"negative_prompt": [""] * 2, "negative_original_size": (32, 32)}, "shared"),
        ("sdxl", {"negative_prompt": [""] * 2, "original_size": (64, 64)}, "own"),
        ("sdxl", {"negative_prompt": [""] * 2, "crops_coords_top_left": (0, 4)}, "own"),
        ("sdxl", {"guidance_scale": 1.0}, "own"),
        ("sdxl", {"guidance_scale": 1.0, "prompt": ["", ""]}, "shared"),
        ("sdxl_controlnet", {"negative_prompt": [""] * 2}, "shared"),
        ("sdxl_adapter", {}, "own"),
        ("pixart", {}, "shared"),
        ("pixart", {"negative_prompt": "sand"}, "own"),
        ("pixart", {"max_sequence_length": 20}, "own"),
        ("pixart", {"guidance_scale": 1.0}, "own"),
        ("pixart", {"guidance_scale": 1.0, "prompt": ["", ""]}, "shared"),
        ("sd3", {}, "shared"),
        ("sd3", {"negative_prompt": ["sand"] * 2}, "own"),
        ("sd3", {"guidance_scale": 1.0}, "own"),
        ("sana", {}, "shared"),
        ("sana", {"negative_prompt": "sand"}, "own"),
        # Told the scale that a head is trained under.
        ("flux", {"guidance_scale": 3.5}, "own"),
        ("flux", {"guidance_scale": 3.5, "prompt": ["", ""]}, "shared"),
        ("flux_schnell", {"max_sequence_length": 256}, "own"),
        ("pixart_alpha", {}, "shared"),
        ("pixart_alpha", {"negative_prompt": "sand", "size": (32, 48)}, "own"),
    ],
)
def test_features_are_read_under_the_heads_own_condition(tokenizer, tiny_head, family, arguments, condition):
    pipe = build(family, tokenizer)
    seen = []

    def spy(features, time_embedding):
        seen.append((features, time_embedding))
        return brightness(features, time_embedding)

    guidance = ReadoutGuidance([GuidanceTerm(FunctionHead(spy, prompt=""))], readout_scale=0.0, branch="uncond")
    calls, handles = calls_of(pipe)
    denoise(pipe, family, guidance, steps=2, **arguments)
    for handle in handles:
        handle.remove()
    assert [step.condition for step in guidance.trace] == [condition] * 2
    if family in ("sdxl_controlnet", "sdxl_adapter"):
        return  # the adapter's residuals come on top
    x, timestep = calls[0][0][:2], calls[0][1].expand(2)
    backbone = DiffusionBackbone(pipe)
    for one, other in zip(seen[0][0], backbone.predict(x, timestep).features, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[0][1], backbone.embed_time(timestep))


@pytest.mark.parametrize("family", ["sdxl", "sdxl_inpaint", "pixart"])
def test_a_scheduler_that_scales_its_sample(tokenizer, family):
    pipe = build(family, tokenizer, scheduler=EulerDiscreteScheduler)
    calls, handles = calls_of(pipe)
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=1e3, branch="both")
    plain = denoise(pipe, family, steps=2)
    count = len(calls)
    assert not torch.allclose(denoise(pipe, family, guidance, steps=2), plain, atol=1e-3)
    pipe.scheduler.set_timesteps(2)
    factor = 1e3 * (1 - alpha_bar(pipe.scheduler, pipe.scheduler.timesteps[0])).sqrt()
    delta = (calls[count][3] - calls[0][3])[:, :4]
    norm = guidance.trace[0].gradient_norm * factor
    torch.testing.assert_close(delta[:2].flatten(1).norm(dim=1), norm, rtol=1e-3, atol=1e-4)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("sd15_controlnet", {"guess_mode": True}),
        ("sd15_controlnet", {"control_guidance_end": 0.5}),
        ("sdxl_adapter", {"adapter_conditioning_factor": 0.5}),
        ("sd15", {"eta": 1.0}),
        ("pixart", {"eta": 1.0}),
    ],
    ids=lambda value: str(value),
)
def test_the_pipelines_own_arguments_keep_their_meaning(tokenizer, family, arguments):
    pipe = build(family, tokenizer)
    plain = denoise(pipe, family, **arguments)
    assert not torch.allclose(plain, denoise(pipe, family), atol=1e-4)
    for branch in ("uncond", "cond", "both"):
        guidance = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0, branch=branch)
        torch.testing.assert_close(denoise(pipe, family, guidance, **arguments), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", mostly_slow(["pixart", *FLOW_MODELS], ("pixart",)))
def test_a_pose_head_learns_on_a_saved_transformer_and_guides_it(tokenizer, poses, tmp_path, family):
    build(family, tokenizer).save_pretrained(tmp_path / "model")
    backbone = DiffusionBackbone.from_pretrained(str(tmp_path / "model"), device="cpu")
    torch.manual_seed(0)
    widths = {name: getattr(backbone, name) for name in ("tap_channels", "time_embed_dim", "condition_dim")}
    small = {"projection_dim": 16, "norm_groups": 2, "hidden_channels": 8, "output_scale": 2}
    head = SpatialHead(variant="keypoints", **widths, **small).attach_backbone(backbone)
    samples = {"keypoints": poses(4), "label": torch.zeros(4, 3, 32, 32), "index": torch.arange(4)}
    samples |= {"latent_mean": torch.randn(4, 4, 8, 8), "latent_std": torch.zeros(4, 4, 8, 8)}
    optimizer, losses = torch.optim.AdamW(head.parameters(), lr=1e-2), []
    for step in range(60):
        batch = {**samples, "epoch": torch.full((4,), step)}
        loss = head.loss(head.readout(*head.sample_noise(batch)), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    head.save_pretrained(tmp_path / "head")

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    term = GuidanceTerm(SpatialHead.from_pretrained(tmp_path / "head"), FixedTarget(poses(2, seed=1)))
    unguided = ReadoutGuidance([term], readout_scale=0.0, branch="uncond")
    guidance = ReadoutGuidance([term], normalize="rms", branch="uncond")
    for each in (unguided, guidance):
        denoise(pipe, family, each, steps=10)
    assert [step.condition for step in guidance.trace] == ["own" if family == "flux" else "shared"] * 10
    assert (guidance.trace[-1].energy < unguided.trace[-1].energy).all()
    assert (guidance.trace[-1].energy < guidance.trace[0].energy).all()


def add_ip_adapter(unet, width, tokens=4):
    """Random weights that let a U-Net attend to image embeddings of `width` too (IP-Adapter, Ye et al., 2023)."""
    cross = unet.config.cross_attention_dim
    attention, number = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            size = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
            for part in ("to_k_ip", "to_v_ip"):
                attention[f"{number}.{part}.weight"] = torch.randn(size) * 0.3
            number += 2
    proj = {"proj.weight": torch.randn(tokens * cross, width) * 0.3, "proj.bias": torch.zeros(tokens * cross)}
    proj |= {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    unet._load_ip_adapter_weights([{"image_proj": proj, "ip_adapter": attention}])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_image_prompts_are_sliced_with_the_rows(tokenizer, family):
    pipe = build(family, tokenizer)
    torch.manual_seed(0)
    add_ip_adapter(pipe.unet, 6)
    # What the unconditional half gets, then the conditional one; the pipeline repeats both for its images.
    embeddings = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
    plain = denoise(pipe, family, **embeddings)
    other = denoise(pipe, family, ip_adapter_image_embeds=[torch.zeros(2, 1, 6)])
    assert not torch.allclose(plain, other, atol=1e-3)
    for branch in ("uncond", "cond", "both"):
        guidance = ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=0.0, branch=branch)
        torch.testing.assert_close(denoise(pipe, family, guidance, **embeddings), plain, rtol=1e-5, atol=1e-5)
