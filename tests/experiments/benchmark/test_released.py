"""The re-created schedule: its passes are counted, its gradient and its images are those of our guidance."""

import pytest
import torch

from experiments.benchmark.counting import counted_passes
from experiments.benchmark.released import both_branches, released_gradient, sample_as_released
from rg.backbone.denoiser import embed_time, tap_channels, time_embed_dim
from rg.backbone.features import predict
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget, ReferenceTarget
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import pick
from tests.families import build

POINTS = {"source": torch.tensor([[[1, 2], [5, 3]]]), "destination": torch.tensor([[[3, 2], [6, 6]]])}


@pytest.fixture
def spatial(tiny_pipeline, tiny_head, poses):
    """A pipeline, a head, its target (poses of two images) and the energy that the schedule takes."""
    pipe, target = tiny_pipeline(), poses(2)
    pipe.unet.requires_grad_(False)
    head = tiny_head(pipe.unet, variant="rgb")
    encoded = head.encode_target(target, readout_size=(16, 16), image_size=(32, 32))
    return pipe, head, FixedTarget(target), lambda readout, reference: head.energy(readout, encoded)


def starts(count):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def test_a_guided_step_takes_twelve_forwards_and_four_backwards_per_image(spatial, denoise):
    pipe, head, target, compare = spatial
    settings = {"head": head, "compare": compare, "num_inference_steps": 3, "guidance_scale": 2.0}
    with counted_passes(pipe.unet) as passes:
        sample_as_released(pipe, starts(4), "a person", **settings)
    assert (passes.forwards, passes.backwards) == (12 * 3 * 2, 4 * 3 * 2)
    guidance = ReadoutGuidance([GuidanceTerm(head, target)])
    with counted_passes(pipe.unet) as passes:
        denoise(pipe, guidance, images=2, steps=3)
    assert (passes.forwards, passes.backwards) == (2 * 3 * 2, 1 * 3 * 2)


def test_its_gradient_of_one_branch_is_ours(spatial):
    # Under the empty prompt both branches are one, and the gradient is twice that of the one that we differentiate.
    pipe, head, target, compare = spatial
    x, timestep = starts(4), torch.tensor(301)
    gradient = released_gradient(pipe, x, timestep, both_branches(pipe, "", x), head, compare)
    edited = x[2:].clone().requires_grad_()
    empty = pipe.encode_prompt("", "cpu", 1, False)[0].detach().expand(2, -1, -1)
    features = predict(pipe.unet, edited, timestep, encoder_hidden_states=empty).features
    energy = compare(head(features, embed_time(pipe.unet, timestep.expand(2))), None)
    span = edited.detach().flatten(1).amax(1) - edited.detach().flatten(1).amin(1)
    (ours,) = torch.autograd.grad((energy * span**2).sum(), edited)
    assert ours.abs().max() > 0
    torch.testing.assert_close(gradient[2:], 2 * ours, rtol=1e-4, atol=1e-8)
    assert not gradient[:2].any(), "no gradient reaches a reference"


def test_its_images_are_those_of_the_released_preset(spatial, denoise):
    pipe, head, target, compare = spatial
    latents, prompt = starts(4), "a person in a red shirt"
    given = {"head": head, "compare": compare, "num_inference_steps": 4, "guidance_scale": 2.0}
    theirs = sample_as_released(pipe, latents, prompt, **given)
    guidance = ReadoutGuidance.preset("released", [GuidanceTerm(head, target)], stop=1.0)
    ours = denoise(pipe, guidance, images=2, prompt=prompt, latents=latents[2:])
    torch.testing.assert_close(theirs[2:], ours, rtol=0, atol=1e-4)
    plain = denoise(pipe, images=2, prompt=prompt, latents=latents[:2])
    torch.testing.assert_close(theirs[:2], plain, rtol=0, atol=1e-5)
    assert (plain - denoise(pipe, images=2, prompt=prompt, latents=latents[2:])).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_drag_in_both_families(tokenizer, family):
    pipe = build(family, tokenizer)
    pipe.unet.requires_grad_(False)
    torch.manual_seed(3)
    widths = {"tap_channels": tap_channels(pipe.unet), "time_embed_dim": time_embed_dim(pipe.unet)}
    head = CorrespondenceHead(**widths, projection_dim=32, norm_groups=2, repulsion=0.5, time_convention="none")
    head.eval().requires_grad_(False)

    def compare(readout, reference):
        return head.energy(readout, pick(reference, POINTS["source"]), **POINTS)

    latents = starts(2)
    given = {"num_inference_steps": 3, "guidance_scale": 2.0}
    theirs = sample_as_released(pipe, latents, "a person", head=head, compare=compare, **given)
    target = ReferenceTarget(keep=lambda readout: pick(readout, POINTS["source"]))
    guidance = ReadoutGuidance.preset("released", [GuidanceTerm(head, target, arguments=POINTS)], stop=1.0)
    given |= {"prompt": ["a person"], "negative_prompt": [""], "output_type": "latent", "height": 32, "width": 32}
    with guidance.record(pipe):
        pipe(latents=latents[:1], **given)
    with guidance.attach(pipe):
        ours = pipe(latents=latents[1:], **given).images
    torch.testing.assert_close(theirs[1:], ours, rtol=0, atol=1e-4)
