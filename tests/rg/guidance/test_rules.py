"""Every rule against its formula in float64: alone, and in whole runs on Gaussian data, where the denoiser is known."""

from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from rg.guidance.clock import Images, signal
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.rules import RULES, Repeats, rule_of
from rg.guidance.updates import (
    UNIT,
    Transition,
    activation,
    dsg,
    freedom,
    mpgd,
    noise_to_output,
    output_to_noise,
    velocity_norm,
)
from tests import families
from tests.rg.guidance.test_closed_forms import (
    CENTRE,
    MEAN,
    SPREAD,
    START,
    Quadratic,
    gaussian,  # noqa: F401
    levels,
    recorded,
)

G, X, EPS, MU, Z = torch.randn(5, 3, 4, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ABAR, BEFORE, SIGMA = (torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.45, 0.2))
STEP = Transition(mean=MU, noise=Z, sigma=SIGMA, abar=ABAR, abar_previous=BEFORE)


def each(function, *values):
    """A formula of one image, image by image."""
    return torch.stack([function(*(value[i] for value in values)) for i in range(len(values[0]))])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_velocity_norm_adds_a_share_of_the_velocitys_length(prediction_type):
    a, s = ABAR.sqrt(), (1 - ABAR).sqrt()
    x0 = (X - s * EPS) / a
    v = a * EPS - s * x0
    output = EPS if prediction_type == "epsilon" else v
    change = velocity_norm(G, output, X, ABAR, prediction_type=prediction_type, strength=2.0, weight=0.1)
    wanted = v + each(lambda v, g: 0.2 * v.norm() * g / g.norm(), v, G)
    noise = output_to_noise(output + change, X, prediction_type, ABAR)
    moved_x0 = (X - s * noise) / a
    torch.testing.assert_close(a * noise - s * moved_x0, wanted, rtol=1e-6, atol=1e-6)


def test_activation_steers_each_branch_by_its_own_length():
    features = torch.cat([X, 3 * EPS])
    change = activation(features, G, strength=0.5, eta=0.1)
    wanted = each(lambda h, g: -0.05 * h.norm() * g / g.norm(), features, torch.cat([G, G]))
    torch.testing.assert_close(change.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_dsg_turns_the_noise_and_keeps_its_length(share):
    n = G[0].numel()

    def formula(g, mu, z):
        best = -(n**0.5) * SIGMA * g / g.norm()
        mixed = SIGMA * z + share * (best - SIGMA * z)
        return mu + n**0.5 * SIGMA * mixed / mixed.norm()

    torch.testing.assert_close(dsg(G, STEP, share=share), each(formula, G, MU, Z))
    torch.testing.assert_close(dsg(G, STEP, share=share / 2, strength=2.0), each(formula, G, MU, Z))
    moved = (dsg(G, STEP, share=share) - MU).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, (n**0.5 * SIGMA).expand(3))
    silent = G * torch.tensor([1.0, 0.0, 1.0]).view(3, 1, 1, 1)
    assert torch.equal(dsg(silent, STEP, share=share)[1], STEP.sample[1])
    assert torch.equal(dsg(G, STEP, share=share, strength=0.0), MU + SIGMA * Z)


def test_freedom_and_mpgd_move_the_sample():
    plain = MU + SIGMA * Z
    torch.testing.assert_close(freedom(G, STEP, strength=0.5, rho=3.0), plain - 1.5 * (1 - 0.3 / 0.45) * G)
    # x0 <- x0 - rate dE/dx0 at fixed noise, E(x0) = |sqrt(abar) x0 + sqrt(1 - abar) EPS - CENTRE|^2 / 2
    x0 = X.clone().requires_grad_()
    x_t = ABAR.sqrt() * x0 + (1 - ABAR).sqrt() * EPS
    (slope,) = torch.autograd.grad((x_t - CENTRE).square().sum() / 2, x0)
    wanted = plain + BEFORE.sqrt() * (-0.2 * slope)
    torch.testing.assert_close(mpgd((x_t - CENTRE).detach(), STEP, rate=0.1, strength=2.0), wanted)


def noise_of(x, abar):
    """The prediction of the Gaussian data's denoiser."""
    s = (1 - abar).sqrt()
    return s * (x - abar.sqrt() * MEAN) / (abar * SPREAD**2 + s**2)


def ddim(x, noise, abar, after):
    return after.sqrt() * (x - (1 - abar).sqrt() * noise) / abar.sqrt() + (1 - after).sqrt() * noise


def steered(rule, x, abar, after, first):
    """One step of a rule on Gaussian data with the energy |x - CENTRE|^2 / 2, without the scheduler's own noise."""
    g = x - CENTRE
    unit = g / (first * g.flatten(1).square().mean(1).sqrt()).sqrt().view(-1, 1, 1, 1)
    noise = noise_of(x, abar)
    if rule == "score":
        noise = noise + UNIT * (1 - abar).sqrt() * unit
    if rule == "velocity_norm":
        noise = noise + velocity_norm(g, noise, x, abar, prediction_type="epsilon")
    if rule == "activation":
        noise = noise_of(x - each(lambda x, g: 0.1 * x.norm() * g / g.norm(), x, g), abar)
    x = ddim(x, noise, abar, after)
    if rule == "freedom":
        x = x - 1.5 * (1 - abar / after) * unit
    if rule == "mpgd":
        x = x - 0.1 * (abar * after).sqrt() * unit
    return x


RUNS = [rule for rule in RULES if rule not in ("adam", "dsg")]  # the one moves x_t first, the other needs noise


@pytest.mark.parametrize("rule", RUNS)
def test_runs_in_closed_form(gaussian, denoise, rule):  # noqa: F811
    pipe = gaussian()
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], update=rule)
    final = denoise(pipe, guidance, latents=START, steps=7)
    x, abars = START, levels(pipe.scheduler)
    first = (START - CENTRE).flatten(1).square().mean(1).sqrt()
    for step, abar, after in zip(guidance.trace, abars[:-1], abars[1:], strict=True):
        torch.testing.assert_close(step.gradient_norm.double(), (x - CENTRE).flatten(1).norm(dim=1), rtol=1e-4, atol=0)
        unmoved = ddim(x, noise_of(x, abar), abar, after)
        x = steered(rule, x, abar, after, first)
        if RULES[rule].moves == "sample":
            torch.testing.assert_close(step.delta_norm.double(), (x - unmoved).flatten(1).norm(dim=1))
    torch.testing.assert_close(final, x, rtol=1e-4, atol=1e-4)
    if rule != "activation":  # which moves what the denoiser believes, not x_t: nothing says that the energy falls
        assert (x - CENTRE).abs().mean() < (denoise(pipe, latents=START, steps=7) - CENTRE).abs().mean()


@pytest.mark.parametrize("rule", [*RUNS, "dsg"])
def test_strength_zero_is_nothing(gaussian, denoise, rule):  # noqa: F811
    pipe = gaussian()
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], update=rule, strength=0.0)
    plain, silent = (denoise(pipe, g, latents=START, steps=4, eta=1.0, images=2) for g in (None, guidance))
    torch.testing.assert_close(silent, plain, rtol=1e-6, atol=1e-6)
    assert len(guidance.trace) == 4 and not any(step.delta_norm.any() for step in guidance.trace)


def test_dsg_keeps_every_step_on_its_sphere(gaussian, denoise):  # noqa: F811
    pipe, energies = gaussian(), []
    for share in (0.0, 0.2, 0.6):
        guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], update=partial(dsg, share=share))
        with recorded(pipe) as calls:
            final = denoise(pipe, guidance, latents=START, steps=7, eta=1.0, guidance_scale=1.0, images=2)
        x, abars = [given for given, _ in calls], levels(pipe.scheduler)
        for now, then, abar, after in zip(x[:-1], x[1:], abars[:-2], abars[1:-1], strict=True):
            sigma = ((1 - after) / (1 - abar) * (1 - abar / after)).sqrt()
            noise = noise_of(now, abar)
            mean = (
                after.sqrt() * (now - (1 - abar).sqrt() * noise) / abar.sqrt() + (1 - after - sigma**2).sqrt() * noise
            )
            if share:
                length = (then - mean).flatten(1).norm(dim=1)
                torch.testing.assert_close(length, (sigma * 256**0.5).expand(2), rtol=1e-4, atol=0)
        energies.append((final - CENTRE).square().mean())
    assert energies[0] > energies[1] > energies[2]


@pytest.mark.parametrize("rule", ["score", "freedom"])
def test_repeats_add_the_noise_anew(gaussian, denoise, rule):  # noqa: F811
    pipe, scale = gaussian(), 3.0
    repeats = Repeats(times=2, start=0.25, stop=0.75)
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], update=rule, repeats=repeats)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    given = {"latents": START, "steps": 4, "guidance_scale": scale, "images": 2}
    final = denoise(pipe, guidance, generator=[torch.Generator().manual_seed(i) for i in range(2)], **given)
    x, abars = START, levels(pipe.scheduler)
    first = (START - CENTRE).flatten(1).square().mean(1).sqrt()
    for number, (abar, after) in enumerate(pairwise(abars)):
        x = steered(rule, x, abar, after, first)
        if number in (1, 2):
            noise = torch.cat([torch.randn(1, 4, 8, 8, generator=generator, dtype=x.dtype) for generator in generators])
            x = (abar / after).sqrt() * x + (1 - abar / after).sqrt() * noise
            x = steered(rule, x, abar, after, first)
    torch.testing.assert_close(final, x, rtol=1e-4, atol=1e-4)
    assert [step.step for step in guidance.trace] == [0, 1, 1, 2, 2, 3]


def test_every_second_gradient_is_held(gaussian, denoise):  # noqa: F811
    pipe, scale = gaussian(), 0.3
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], readout_scale=scale, every=2)
    final = denoise(pipe, guidance, latents=START, steps=5)
    x, abars, gradient = START, levels(pipe.scheduler), None
    for number, (abar, after) in enumerate(pairwise(abars)):
        gradient = x - CENTRE if number % 2 == 0 else gradient
        x = ddim(x, noise_of(x, abar) + scale * (1 - abar).sqrt() * gradient, abar, after)
    torch.testing.assert_close(final, x, rtol=1e-5, atol=1e-5)
    assert [step.condition for step in guidance.trace] == ["shared", "held", "shared", "held", "shared"]


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_strength_has_no_unit(gaussian, denoise, factor):  # noqa: F811
    terms = [GuidanceTerm(Quadratic()), GuidanceTerm(Quadratic(), weight=2.0)]
    scaled = [GuidanceTerm(term.head, weight=factor * term.weight) for term in terms]
    one, other = (denoise(gaussian(), ReadoutGuidance(given), latents=START, steps=5) for given in (terms, scaled))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_gradient_is_measured_by_each_images_first():
    images = Images()
    first = images.in_units(torch.stack([G[0], 100 * G[1], 0 * G[2]]))
    torch.testing.assert_close(first[:2].flatten(1).square().mean(1), torch.ones(2, dtype=torch.float64))
    assert not first[2].any()
    later = images.in_units(torch.stack([0.5 * G[0], 50 * G[1], G[2]]))
    torch.testing.assert_close(later[:2], first[:2] / 2**0.5)
    torch.testing.assert_close(later[2].square().mean(), torch.ones((), dtype=torch.float64))


def test_the_same_signal_comes_out_of_more_noise_on_more_pixels(gaussian, denoise):  # noqa: F811
    # Four times the side, sixteen times the pixels: the same structures are there at a sixteenth of the SNR.
    small, large = torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 64, 64)
    for snr in (1e-3, 0.1, 20.0):
        abar, noisier = (torch.tensor(value / (1 + value)) for value in (snr, snr / 16))
        assert signal(abar, small) == pytest.approx(signal(noisier, large), rel=1e-4)
    pipe = gaussian()
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], signal_window=(1.0, 100.0))
    denoise(pipe, guidance, latents=START, steps=20)
    abar = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps]
    inside = (64 * abar / (1 - abar) >= 1) & (64 * abar / (1 - abar) < 100)
    assert 3 < inside.sum() < 17
    assert [step.step for step in guidance.trace] == inside.nonzero().flatten().tolist()


def test_an_image_whose_energy_is_low_is_left_alone(gaussian, denoise):  # noqa: F811
    # The first image starts at the target and drifts off it; the second is pulled.
    pipe, start = gaussian(), torch.stack([START[0] * 0.01 + CENTRE, START[1] + 6])
    free = denoise(pipe, latents=start, steps=8)
    guidance = ReadoutGuidance([GuidanceTerm(Quadratic())], enough=0.5)
    final = denoise(pipe, guidance, latents=start, steps=8)
    energies = torch.stack([step.energy for step in guidance.trace])
    stopped = (energies <= 0.5 * energies[0]).cumsum(0) > 0
    moved = torch.stack([step.delta_norm for step in guidance.trace]) > 0
    assert torch.equal(moved, ~stopped) and stopped[-1, 1] and not stopped[-1, 0]
    alone = denoise(pipe, ReadoutGuidance([GuidanceTerm(Quadratic())], enough=0.5), latents=start[1:], steps=8)
    torch.testing.assert_close(final[1:], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(final, free)
    everyone = ReadoutGuidance([GuidanceTerm(Quadratic())], enough=1.0)
    assert torch.equal(denoise(pipe, everyone, latents=start, steps=8), free) and len(everyone.trace) == 1


def prompted(features, time_embedding):
    return sum(feature.square().flatten(1).mean(1) for feature in features)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("family", families.mostly_slow(("sd15", "sdxl", "sd15_inpaint", "pixart"), ("sd15", "pixart")))
def test_rules_lower_the_energy_on_every_family(tokenizer, family, rule):
    pipe = families.build(family, tokenizer)
    settings = {"update": rule, "repeats": Repeats(start=0.0, stop=0.5)} | ({} if rule == "dsg" else {"every": 2})
    ends = []
    for strength in (0.0, 1.0):
        guidance = ReadoutGuidance([GuidanceTerm(prompted)], strength=strength, **settings)
        families.denoise(pipe, family, guidance, steps=6, eta=1.0)
        assert all(step.delta_norm.isfinite().all() for step in guidance.trace)
        ends.append(guidance.trace[-1].energy)
    assert (ends[1] < ends[0]).all() if rule != "activation" else (ends[1] != ends[0]).all()


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        # row forwards, row backwards per image of a run of 4 steps
        ({"update": "score"}, (8, 4)),
        ({"update": "dsg"}, (8, 4)),
        ({"update": "mpgd"}, (8, 4)),
        ({"update": "velocity_norm", "every": 2}, (8, 2)),
        ({"update": "activation"}, (12, 0)),
        ({"update": "activation", "every": 4}, (9, 0)),
        ({"update": "freedom", "repeats": Repeats(times=3, start=0.5, stop=1.0)}, (16, 8)),
    ],
)
def test_what_a_rule_costs(tiny_pipeline, denoise, settings, calls):
    pipe, rows = tiny_pipeline(), Counter()

    def count(_module, given):
        rows["forward"] += len(given[0])
        if given[0].requires_grad:
            given[0].register_hook(lambda gradient: rows.update({"backward": len(gradient)}))

    pipe.unet.conv_in.register_forward_pre_hook(count)
    denoise(pipe, ReadoutGuidance([GuidanceTerm(prompted)], **settings), images=2, steps=4, eta=1.0)
    assert (rows["forward"] / 2, rows["backward"] / 2) == calls


def test_rules_and_settings_that_are_not_there_are_named(tiny_pipeline, denoise):
    terms = [GuidanceTerm(prompted)]
    assert rule_of(partial(dsg, share=0.2)) == ("dsg", {"share": 0.2})
    for settings, words in (
        ({"update": partial(dsg, shares=0.2)}, r"update: dsg takes \('share',\), got \['shares'\]"),
        ({"update": partial(noise_to_output)}, "update: expected one of .*'dsg'.*, got <function noise_to_output"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"strength": -1.0}, "strength: expected at least 0, got -1.0"),
        ({"signal_window": (2.0, 1.0)}, r"signal_window: expected 0 <= low <= high, got \(2.0, 1.0\)"),
    ):
        with pytest.raises(ValueError, match=words):
            ReadoutGuidance(terms, **settings)
    with pytest.raises(ValueError, match="repeats: expected rg.guidance.Repeats or None, got '/root'"):
        ReadoutGuidance([GuidanceTerm(Quadratic())], repeats="/root")
    with pytest.raises(ValueError, match="repeats.times: expected at least 1, got 0"):
        Repeats(times=0)
    with pytest.raises(ValueError, match="repeats: expected 0 <= start <= stop <= 1, got 0.7 and 0.3"):
        Repeats(start=0.7, stop=0.3)
    euler = tiny_pipeline(scheduler=EulerDiscreteScheduler)
    for rule in ("dsg", "freedom", "mpgd"):
        with pytest.raises(ValueError, match=f"update={rule} is defined for DDIMScheduler, got EulerDiscreteScheduler"):
            denoise(euler, ReadoutGuidance(terms, update=rule))
    with pytest.raises(ValueError, match="repeats are defined for DDIMScheduler, got EulerDiscreteScheduler"):
        denoise(euler, ReadoutGuidance(terms, repeats=Repeats()))
    ddim_pipe = tiny_pipeline(scheduler=DDIMScheduler)
    with pytest.raises(ValueError, match="eta: update=dsg turns the noise .*; expected above 0, got 0"):
        denoise(ddim_pipe, ReadoutGuidance(terms, update="dsg"), eta=0.0)
    with pytest.raises(ValueError, match="guidance_rescale: repeated steps do not know it"):
        denoise(ddim_pipe, ReadoutGuidance(terms, update="adam", repeats=Repeats()), guidance_rescale=0.7)
    with pytest.raises(ValueError, match="guidance_rescale: it would rescale the velocity_norm update too"):
        denoise(ddim_pipe, ReadoutGuidance(terms, update="velocity_norm"), guidance_rescale=0.7)


@pytest.mark.parametrize("broken", [False, True])
def test_the_scheduler_is_as_it_was(tiny_pipeline, denoise, broken):
    pipe = tiny_pipeline()
    plain, before = denoise(pipe, eta=1.0), sorted(vars(pipe.scheduler))
    calls = []

    def head(features, time_embedding):
        calls.append(1)
        return prompted(features, time_embedding) * (float("nan") if broken and len(calls) == 3 else 1.0)

    guidance = ReadoutGuidance([GuidanceTerm(head)], update="freedom", repeats=Repeats(start=0.0, stop=1.0))
    with pytest.raises(FloatingPointError) if broken else pytest.MonkeyPatch.context():
        denoise(pipe, guidance, eta=1.0)
    assert sorted(vars(pipe.scheduler)) == before and not pipe.unet.up_blocks[0].resnets[0].conv2._forward_hooks
    assert torch.equal(denoise(pipe, eta=1.0), plain)
