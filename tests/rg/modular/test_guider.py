"""The guider on tiny modular pipelines: what it adds, what is refused, and how it is kept."""

from pathlib import Path

import diffusers.utils.hub_utils
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from rg.backbone.denoiser import condition_dim, denoiser_of, tap_channels, time_embed_dim
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget
from rg.heads.spatial import SpatialHead
from rg.modular import ReadoutGuider
from tests.families import build, make_schedule
from tests.modular import build_modular, run_modular

KINDS = ("sdxl", "sd3", "flux2", "qwen")
FAST = [kind if kind in ("sd3", "flux2") else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(autouse=True)
def _quiet():
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity(60)  # blocks log the stack of whatever they raise
    yield
    diffusers.utils.logging.set_verbosity(level)


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


TERMS = [GuidanceTerm(brightness)]


def with_guider(pipe, **settings):
    guider = ReadoutGuider(**{"guidance_scale": 2.0} | settings)
    pipe.update_components(guider=guider)
    return guider


def spatial_head(denoiser, **widths):
    own = {"tap_channels": tap_channels(denoiser), "time_embed_dim": time_embed_dim(denoiser)}
    own |= {"condition_dim": condition_dim(denoiser)} | widths
    small = {"projection_dim": 16, "norm_groups": 2, "hidden_channels": 8}
    return SpatialHead(variant="rgb", **own, **small).requires_grad_(False).eval()


def left_behind(denoiser):
    hooks = [part for part in denoiser.modules() if part._forward_hooks or part._forward_pre_hooks]
    return hooks, hasattr(denoiser, "_diffusers_hook"), "forward" in vars(denoiser)


CLEAN = ([], False, False)


@pytest.mark.parametrize("kind", FAST)
def test_strength_zero_is_text_guidance_and_more_lowers_the_energy(tokenizer, kind):
    pipe = build_modular(kind, tokenizer)
    plain = run_modular(pipe, kind, steps=6) if with_guider(pipe) else None
    before = [p.requires_grad for p in denoiser_of(pipe).parameters()]
    energies = []
    for strength in (0.0, 0.3):
        guider = with_guider(pipe, strength=strength, update="velocity_norm").steer(terms=TERMS)
        guided = run_modular(pipe, kind, steps=6)
        assert torch.equal(guided, plain) == (strength == 0)
        assert [step.step for step in guider.trace] == list(range(6)) and guided.isfinite().all()
        energies.append(guider.trace[-1].energy)
    assert (energies[1] < energies[0]).all()
    assert left_behind(denoiser_of(pipe)) == CLEAN
    assert [p.requires_grad for p in denoiser_of(pipe).parameters()] == before
    guider.steer()
    assert torch.equal(run_modular(pipe, kind, steps=6), plain) and not guider.trace


@pytest.mark.parametrize("kind", FAST[:2])
@pytest.mark.parametrize("branch", ["uncond", "cond", "both"])
def test_it_does_what_attach_does(tokenizer, kind, branch):
    own = make_schedule("epsilon") if kind == "sdxl" else None
    pipe, plain = build_modular(kind, tokenizer, scheduler=own), build(kind, tokenizer)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    width, pooled = {"sdxl": (16, 8), "sd3": (18, 16)}[kind]
    given = {"num_inference_steps": 4, "height": 32, "width": 32, "latents": latents}
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given[name] = torch.randn(2, 5, width, generator=generator)
    for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
        given[name] = torch.randn(2, pooled, generator=generator)
    guidance = ReadoutGuidance(TERMS, strength=0.5, branch=branch)
    with guidance.attach(plain):
        wanted = plain(**given, guidance_scale=2.0, output_type="latent").images
    guider = with_guider(pipe, strength=0.5, branch=branch).steer(terms=TERMS)
    torch.testing.assert_close(pipe(**given, output="latents"), wanted, rtol=1e-3, atol=1e-3)
    for one, other in zip(guider.trace, guidance.trace, strict=True):
        total = other.energy
        torch.testing.assert_close(one.energy, total, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.delta_norm, other.delta_norm, rtol=1e-2, atol=1e-4)


def test_video_is_refused_and_the_pipeline_is_left_as_it_was(tokenizer):
    pipe = build_modular("wan", tokenizer)
    with_guider(pipe).steer(terms=TERMS)
    with pytest.raises(ValueError, match="no readout taps: expected .* got WanTransformer3DModel"):
        run_modular(pipe, "wan")
    assert left_behind(pipe.transformer) == CLEAN


def test_without_a_negative_prompt_there_is_only_the_prompts_branch(tokenizer):
    pipe = build_modular("flux2", tokenizer)
    with_guider(pipe, guidance_scale=1.0, branch="uncond").steer(terms=TERMS)
    with pytest.raises(ValueError, match=r"branch=uncond .* step 0 has none: guidance_scale is 1\.0.*branch=cond"):
        run_modular(pipe, "flux2")
    guider = with_guider(pipe, guidance_scale=1.0, branch="cond").steer(terms=TERMS)
    assert run_modular(pipe, "flux2").isfinite().all() and len(guider.trace) == 4


def test_what_does_not_fit_is_refused_before_the_denoiser_runs(tokenizer):
    pipe = build_modular("sd3", tokenizer)
    head = spatial_head(pipe.transformer, condition_dim=7)
    with_guider(pipe).steer(terms=[GuidanceTerm(head, FixedTarget(torch.zeros(1, 3, 32, 32)))])
    with pytest.raises(ValueError, match="another model family .* width 7, this backbone's have 18"):
        run_modular(pipe, "sd3")
    sample = build_modular("sdxl", tokenizer, scheduler=EulerDiscreteScheduler(prediction_type="sample"))
    with_guider(sample).steer(terms=TERMS)
    with pytest.raises(ValueError, match="prediction_type is 'sample', expected one of"):
        run_modular(sample, "sdxl")
    with pytest.raises(ValueError, match="expected score or velocity_norm in a guider, got dsg"):
        ReadoutGuider(update="dsg").steer(terms=TERMS)
    with pytest.raises(ValueError, match="head: expected one to read the control with"):
        ReadoutGuider().steer(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="block of a modular pipeline"):
        guider = ReadoutGuider(branch="cond").steer(terms=TERMS)
        guider.set_state(0, 4, torch.tensor(999))
        guider.prepare_models(pipe.transformer)


def test_a_denoiser_that_raises_is_left_as_it_was(tokenizer):
    pipe = build_modular("sd3", tokenizer)

    def fails(features, time_embedding):
        raise ArithmeticError("of the head")

    with_guider(pipe).steer(terms=[GuidanceTerm(fails)])
    with pytest.raises(ArithmeticError):
        run_modular(pipe, "sd3")
    assert left_behind(pipe.transformer) == CLEAN
    with_guider(pipe)
    assert run_modular(pipe, "sd3").isfinite().all()


def test_a_saved_guider_comes_back_with_its_head(tokenizer, tmp_path, monkeypatch):
    pipe = build_modular("sd3", tokenizer)
    head = spatial_head(pipe.transformer)
    control = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    guider = with_guider(pipe, head=head, strength=0.4, readout_stop=0.5).steer(control)
    guided = run_modular(pipe, "sd3")
    assert len(guider.trace) == 2
    guider.save_pretrained(tmp_path)
    files = ["guider_config.json", "head.json", "head.safetensors"]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == files

    loaded = ReadoutGuider.from_pretrained(tmp_path)
    assert dict(loaded.config) == dict(guider.config) and loaded.config.strength == 0.4
    pipe.update_components(guider=loaded.steer(control))
    assert torch.equal(run_modular(pipe, "sd3"), guided)
    assert loaded.new(strength=0.0).head is loaded.head and loaded.new(strength=0.0).config.strength == 0.0

    sent = {}
    hub = diffusers.utils.hub_utils
    monkeypatch.setattr(hub, "create_repo", lambda repo_id, **_: type("Repository", (), {"repo_id": repo_id}))
    monkeypatch.setattr(hub, "load_or_create_model_card", lambda *_, **__: hub.ModelCard("---\ntags: []\n---\n"))

    def record(folder_path, **others):
        sent.update(others, files=sorted(p.name for p in Path(folder_path).rglob("*.*")))

    monkeypatch.setattr(hub, "upload_folder", record)
    guider.push_to_hub("somebody/guider")
    assert sent["repo_id"] == "somebody/guider"
    assert sent["files"] == ["README.md", *files]
