"""A drag with heads of the authors' layout, against their loop written out."""

import pytest
import torch
import torch.nn.functional as F

from rg.backbone.denoiser import embed_time, taps
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import ReferenceTarget
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.protocol import EnergyHead, FunctionHead
from rg.heads.relative import pick

POINTS = {"source": torch.tensor([[[1, 2], [5, 3]]]), "destination": torch.tensor([[[3, 2], [6, 6]]])}


class Compared(EnergyHead):
    """A term without a target: the energy of `head` against the readouts of a reference, kept step by step."""

    def __init__(self, head, **arguments):
        self.head, self.arguments, self.kept, self.step = head, arguments, [], 0
        self.readout_span, self.time_index = head.readout_span, head.time_index

    def keep(self, features, time_embedding):
        self.kept.append(self.head(features, time_embedding).detach())
        return features[0].flatten(1).sum(1) * 0

    def __call__(self, features, time_embedding):
        reference, self.step = self.kept[self.step], self.step + 1
        if isinstance(self.head, CorrespondenceHead):
            reference = pick(reference, self.arguments["source"])
        return self.head.energy(self.head(features, time_embedding), reference, **self.arguments)


def kept(term):
    """The same term, keeping instead of comparing."""
    keeper = FunctionHead(term.keep)
    keeper.time_index = term.time_index
    return keeper


@pytest.fixture
def heads(tiny_pipeline):
    unet = tiny_pipeline().unet
    widths = {"tap_channels": [tap.out_channels for tap in taps(unet).values()], "time_embed_dim": 32}
    torch.manual_seed(3)
    appearance = AppearanceHead(**widths, projection_dim=32, norm_groups=2)
    correspondence = CorrespondenceHead(
        **widths, projection_dim=32, norm_groups=2, repulsion=0.5, time_convention="none"
    )
    return [head.eval().requires_grad_(False) for head in (appearance, correspondence)]


def theirs(pipe, appearance, correspondence, latents, prompt, steps):
    """Two rows, reference and edited; both branches; AdamW on x_t in the first half; then DDIM from the moved x_t."""
    unet = pipe.unet.requires_grad_(False)
    condition, empty = pipe.encode_prompt([prompt] * 2, "cpu", 1, True)
    condition = torch.cat([empty, condition]).detach()
    features = []
    handles = [tap.register_forward_hook(lambda _m, _i, out: features.append(out)) for tap in taps(unet).values()]
    pipe.scheduler.set_timesteps(steps)
    x = latents
    for step, t in enumerate(pipe.scheduler.timesteps):
        if step < steps // 2:
            x = x.clone().requires_grad_()
            optimizer = torch.optim.AdamW([x], lr=2e-2, weight_decay=0.0)
            features.clear()
            unet(torch.cat([x, x]), t, condition)
            span = x[1].detach().max() - x[1].detach().min()
            look = appearance(features, embed_time(unet, t.expand(4)))
            place = correspondence(features, None)
            loss = 0
            for reference, edited in ((0, 1), (2, 3)):
                loss = loss + span**2 * (1 - F.cosine_similarity(look[edited], look[reference].detach(), dim=0)).mean()
                r, o = (F.normalize(place[row], dim=0) for row in (reference, edited))
                similarity = (1 + torch.einsum("cij,ckl->ijkl", r.detach(), o)) / 2
                for (x1, y1), (x2, y2) in zip(POINTS["source"][0], POINTS["destination"][0], strict=True):
                    loss = loss - 0.5 * similarity[y1, x1, y2, x2] / 2 + 0.5 * similarity[y1, x1, y1, x1] / 2
            loss.backward()
            optimizer.step()
            x = x.detach()
        with torch.no_grad():
            empty_noise, noise = unet(torch.cat([x, x]), t, condition).sample.chunk(2)
        x = pipe.scheduler.step(empty_noise + 2.0 * (noise - empty_noise), t, x).prev_sample
    for handle in handles:
        handle.remove()
    return x


def test_a_drag_by_the_preset_is_the_authors_loop(tiny_pipeline, denoise, heads):
    pipe, prompt, steps = tiny_pipeline(), "a person", 6
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = theirs(tiny_pipeline(), *heads, latents, prompt, steps)
    compared = [Compared(heads[0]), Compared(heads[1], **POINTS)]
    settings = {"steps": steps, "prompt": prompt}
    record = ReadoutGuidance([GuidanceTerm(kept(term)) for term in compared], readout_scale=0.0, branch="both")
    reference = denoise(pipe, record, latents=latents[:1], **settings)
    torch.testing.assert_close(reference, expected[:1], rtol=0, atol=1e-5)
    guidance = ReadoutGuidance.preset("released", [GuidanceTerm(term) for term in compared])
    edited = denoise(pipe, guidance, latents=latents[1:], **settings)
    assert len(guidance.trace) == 3
    torch.testing.assert_close(edited, expected[1:], rtol=0, atol=1e-4)
    plain = denoise(pipe, latents=latents[1:], **settings)
    assert (plain - edited).abs().max() > 1e-2


def test_a_drag_by_a_recorded_reference_is_the_authors_loop(tiny_pipeline, denoise, heads):
    prompt, steps = "a person", 6
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    expected = theirs(tiny_pipeline(), *heads, latents, prompt, steps)
    look, place = ReferenceTarget(), ReferenceTarget(keep=lambda readout: pick(readout, POINTS["source"]))
    terms = [GuidanceTerm(heads[0], look), GuidanceTerm(heads[1], place, arguments=POINTS)]
    guidance = ReadoutGuidance.preset("released", terms)
    pipe = tiny_pipeline()
    with guidance.record(pipe):
        reference = denoise(pipe, latents=latents[:1], prompt=prompt, steps=steps)
    torch.testing.assert_close(reference, expected[:1], rtol=0, atol=1e-5)
    # Three steps, two branches, 32 channels: a map of 8x8, or the vectors at two points.
    assert (look.nbytes, place.nbytes) == (4 * 3 * 2 * 32 * 64, 4 * 3 * 2 * 32 * 2)
    edited = denoise(pipe, guidance, latents=latents[1:], prompt=prompt, steps=steps)
    torch.testing.assert_close(edited, expected[1:], rtol=0, atol=1e-4)
    assert (denoise(pipe, latents=latents[1:], prompt=prompt, steps=steps) - edited).abs().max() > 1e-2
