from contextlib import nullcontext

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from PIL import Image

from rg.guidance.guidance import PRESETS, GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


class Breaks:
    """A head whose energy is `value` in the rows `rows` at call `step`; it does not even depend on the features."""

    def __init__(self, step, value=float("nan"), rows=slice(None)):
        self.calls, self.step, self.value, self.rows = 0, step, value, rows

    def __call__(self, features, time_embedding):
        energy = brightness(features, time_embedding)
        if self.calls == self.step:
            energy = energy.detach()
            energy[self.rows] = self.value
        self.calls += 1
        return energy


def traces(pipe):
    """What an attachment could leave behind on the pipeline's denoiser and scheduler."""
    modules = {name: sorted(vars(module)) for name, module in pipe.unet.named_modules()}
    hooks = {
        name: [len(module._forward_hooks), len(module._forward_pre_hooks), getattr(module, "gradient_checkpointing", 0)]
        for name, module in pipe.unet.named_modules()
    }
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    return modules, hooks, flags, sorted(vars(pipe.scheduler)), pipe.unet.forward


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update": "sgd"}, r"update: expected one of \('score', 'adam', 'dsg', .*\), got 'sgd'"),
        ({"branch": "none"}, r"branch: expected one of \('uncond', 'cond', 'both'\), got 'none'"),
        ({"normalize": "max"}, r"normalize: expected one of \(None, 'rms'\), got 'max'"),
        ({"start": 0.6, "stop": 0.5}, "got 0.6 and 0.5"),
        ({"stop": 1.5}, "start <= stop <= 1"),
        ({"start": -0.1}, "0 <= start"),
        ({"terms": []}, "at least one GuidanceTerm"),
    ],
)
def test_unknown_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ReadoutGuidance(**{"terms": [GuidanceTerm(brightness)]} | settings)


def test_presets():
    terms = [GuidanceTerm(brightness)]
    for name, settings in PRESETS.items():
        guidance = ReadoutGuidance.preset(name, terms)
        assert settings.items() <= vars(guidance).items()
    assert (PRESETS["paper"]["update"], PRESETS["released"]["update"]) == ("score", "adam")
    assert ReadoutGuidance.preset("released", terms, stop=0.7).stop == 0.7
    with pytest.raises(ValueError, match=r"preset: expected one of \['paper', 'released'\], got 'fast'"):
        ReadoutGuidance.preset("fast", terms)


def test_heads_of_two_prompts_and_targets_without_a_head_are_refused(tiny_pipeline, tiny_head, poses):
    unet, target = tiny_pipeline().unet, FixedTarget(poses(1))
    heads = [tiny_head(unet, prompt=prompt) for prompt in ("", "a person")]
    with pytest.raises(ValueError, match=r"under one prompt, got \['', 'a person'\]"):
        ReadoutGuidance([GuidanceTerm(head, target) for head in heads])
    with pytest.raises(TypeError, match=r"EnergyHead.*function"):
        GuidanceTerm(brightness, target)


def test_pipelines_that_cannot_be_guided_are_left_untouched(tiny_pipeline, tiny_head, poses):
    pipe = tiny_pipeline(scheduler=EulerDiscreteScheduler)
    foreign = tiny_head(pipe.unet)
    foreign.hparams.tap_channels = [32, 32, 16, 16]
    before = traces(pipe)
    term = GuidanceTerm(foreign, FixedTarget(poses(1)))
    for guidance, words in (
        (ReadoutGuidance([term]), r"channels \[32, 32, 16, 16\].*has \[16, 16, 8, 8\] and 32"),
        (ReadoutGuidance([GuidanceTerm(brightness)], update="adam"), "DDIMScheduler, got EulerDiscreteScheduler"),
    ):
        with pytest.raises(ValueError, match=words), guidance.attach(pipe):
            pass
        assert traces(pipe) == before


@pytest.mark.parametrize("settings", [{}, {"update": "adam"}, {"checkpointing": True}])
@pytest.mark.parametrize("broken", [False, True])
def test_attach_leaves_no_trace(tiny_pipeline, denoise, settings, broken):
    pipe = tiny_pipeline()
    for number, parameter in enumerate(pipe.unet.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    plain = denoise(pipe)
    before = traces(pipe)
    guidance = ReadoutGuidance([GuidanceTerm(Breaks(1 if broken else 99))], readout_scale=100.0, **settings)
    with pytest.raises(FloatingPointError) if broken else nullcontext():
        assert not torch.allclose(denoise(pipe, guidance), plain, atol=1e-3)
    assert traces(pipe) == before
    assert torch.equal(denoise(pipe), plain)


def test_second_attachment_is_refused_and_the_first_goes_on(tiny_pipeline, denoise):
    pipe = tiny_pipeline()
    guidance, other = (ReadoutGuidance([GuidanceTerm(brightness)], readout_scale=100.0) for _ in range(2))
    alone = denoise(pipe, guidance)
    with guidance.attach(pipe):
        with pytest.raises(RuntimeError, match="attached to this pipeline already"):
            denoise(pipe, other)
        assert torch.equal(denoise(pipe), alone)
    assert torch.equal(denoise(pipe, other), alone)


def test_every_run_starts_at_step_zero(tiny_pipeline, denoise):
    pipe = tiny_pipeline()
    guidance = ReadoutGuidance([GuidanceTerm(brightness), GuidanceTerm(Breaks(10))], readout_scale=100.0, update="adam")
    with guidance.attach(pipe):
        first = denoise(pipe, steps=4)
        trace = list(guidance.trace)
        assert torch.equal(denoise(pipe, steps=4), first)
        assert [step.step for step in guidance.trace] == [0, 1, 2, 3]
        assert [step.energy.item() for step in guidance.trace] == [step.energy.item() for step in trace]
        with pytest.raises(FloatingPointError, match="guidance step 2 "):
            denoise(pipe, steps=4)
        assert [step.step for step in guidance.trace] == [0, 1]
        assert torch.equal(denoise(pipe, steps=4), first)
        assert [step.step for step in guidance.trace] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("start", "stop", "steps"),
    [(0, 1, range(10)), (0, 0.5, range(5)), (0.5, 1, range(5, 10)), (0.25, 0.75, range(3, 8)), (0.3, 0.3, [])],
)
def test_window_is_a_fraction_of_the_steps(tiny_pipeline, denoise, start, stop, steps):
    pipe = tiny_pipeline()
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], start=start, stop=stop)
    denoise(pipe, guidance, steps=10)
    assert [step.step for step in guidance.trace] == list(steps)
    assert [step.timestep for step in guidance.trace] == [pipe.scheduler.timesteps[i] for i in steps]


def test_window_counts_the_steps_that_the_scheduler_adds(tiny_pipeline, denoise):
    pipe = tiny_pipeline(scheduler=PNDMScheduler)
    guidance = ReadoutGuidance([GuidanceTerm(brightness)], start=0.5)
    denoise(pipe, guidance, steps=10)
    executed = len(pipe.scheduler.timesteps)
    assert executed > 10
    assert [step.step for step in guidance.trace] == list(range(-(-executed // 2), executed))


@pytest.mark.parametrize(("value", "rows", "named"), [("nan", slice(None), r"\[0, 1\]"), ("inf", 1, r"\[1\]")])
def test_energy_that_is_not_finite_names_step_and_rows(tiny_pipeline, denoise, value, rows, named):
    guidance = ReadoutGuidance([GuidanceTerm(Breaks(2, float(value), rows))])
    with pytest.raises(FloatingPointError, match=rf"guidance step 2 \(t=251\): energy is not finite for rows {named}"):
        denoise(tiny_pipeline(), guidance, images=2)


def test_gradient_that_is_not_finite_names_step_and_rows(tiny_pipeline, denoise):
    def cusp(features, time_embedding):
        bright = brightness(features, time_embedding)
        return torch.stack([(bright[0] - bright[0].detach()).sqrt(), bright[1]])

    with pytest.raises(FloatingPointError, match=r"guidance step 0 \(t=751\): gradient is not finite for rows \[0\]"):
        denoise(tiny_pipeline(), ReadoutGuidance([GuidanceTerm(cusp)]), images=2)


@pytest.mark.parametrize(
    ("variant", "control", "words"),
    [
        ("keypoints", torch.ones(2, 1, 18, 3), "control: expected 1 or 3 of them, one per image, got 2"),
        (
            "keypoints",
            torch.zeros(1, 3, 32, 32),
            r"variant=keypoints expects \(B,P,18,3\) keypoints, got \(1, 3, 32, 32\)",
        ),
        ("keypoints", torch.ones(1, 18, 3), r"got \(1, 18, 3\)"),
        ("rgb", torch.zeros(1, 3, 64, 64), r"expected images \(B,3,32,32\), got \(1, 3, 64, 64\)"),
        ("rgb", torch.zeros(1, 1, 32, 32), r"got \(1, 1, 32, 32\)"),
        ("rgb", [Image.new("RGB", (32, 16))], r"expected images \(B,3,32,32\), got \(1, 3, 16, 32\)"),
    ],
)
def test_controls_that_do_not_fit_are_named(tiny_pipeline, tiny_head, denoise, variant, control, words):
    pipe = tiny_pipeline()
    guidance = ReadoutGuidance([GuidanceTerm(tiny_head(pipe.unet, variant=variant), FixedTarget(control))])
    with pytest.raises(ValueError, match=words):
        denoise(pipe, guidance, images=3)


def test_rescaled_classifier_free_guidance_is_refused_for_the_score_rule(tiny_pipeline, denoise):
    pipe, terms = tiny_pipeline(scheduler=DDIMScheduler), [GuidanceTerm(brightness)]
    with pytest.raises(ValueError, match="guidance_rescale"):
        denoise(pipe, ReadoutGuidance(terms), guidance_rescale=0.7)
    denoise(pipe, ReadoutGuidance(terms, update="adam"), guidance_rescale=0.7)


def test_a_head_gives_one_energy_per_image(tiny_pipeline, denoise):
    guidance = ReadoutGuidance([GuidanceTerm(lambda *given: brightness(*given).mean())])
    with pytest.raises(ValueError, match=r"expected one energy per row, \(2,\), got \(\)"):
        denoise(tiny_pipeline(), guidance, images=2)
