"""The taps of U-Nets and of PixArt's transformer: their names, their maps, and the models' own embeddings of time."""

import pytest
import torch
from torch import nn

from rg.backbone.denoiser import denoiser_of, embed_time, latent_channels, tap_channels, taps, time_embed_dim
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.features import as_map, predict
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from tests.families import build, denoise


@pytest.fixture
def transformer(tokenizer):
    return build("pixart", tokenizer).transformer.requires_grad_(False)


def inputs(rows, tokens=5):
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(rows, tokens, 10, generator=generator)
    return {"encoder_hidden_states": text, "encoder_attention_mask": torch.ones(rows, tokens)}


def test_taps_of_a_unet_are_the_decoders_second_convolutions_coarse_to_fine(tiny_pipeline):
    unet = tiny_pipeline().unet
    found = taps(unet)
    assert list(found) == [f"up_blocks.{i}.resnets.{j}.conv2" for i in (0, 1) for j in (0, 1)]
    assert all(module is unet.get_submodule(name) for name, module in found.items())
    with pytest.raises(ValueError, match=r"up_blocks.*PixArt.* Linear"):
        taps(nn.Linear(1, 1))


def test_taps_of_a_transformer_are_its_blocks(transformer):
    found = taps(transformer)
    assert list(found) == [f"transformer_blocks.{i}" for i in range(3)]
    assert all(module is transformer.get_submodule(name) for name, module in found.items())
    assert taps(torch.compile(transformer, backend="eager")).keys() == found.keys()
    features = predict(transformer, torch.randn(2, 4, 8, 12), torch.tensor(7), **inputs(2)).features
    assert [tuple(f.shape) for f in features] == [(2, channels, 4, 6) for channels in tap_channels(transformer)]
    assert (latent_channels(transformer), transformer.config.out_channels) == (4, 8)


def test_tokens_are_laid_out_row_by_row(transformer):
    sample, known = torch.zeros(2, 4, 8, 12), torch.randn(2, 24, 4, 6)
    assert torch.equal(as_map(known.flatten(2).transpose(1, 2), transformer, sample), known)
    # Without attention among patches, a cell of the features is what its own 2x2 latents say, and nothing else.
    for block in transformer.transformer_blocks:
        block.attn1.to_out[0].weight.zero_()
    sample = torch.randn(1, 4, 8, 12)
    moved = sample.clone()
    moved[:, :, 5, 8] += 1
    one, other = (predict(transformer, x, torch.tensor(7), **inputs(1)).features for x in (sample, moved))
    for before, after in zip(one, other, strict=True):
        changed = (before - after).abs().amax(1)[0] > 1e-5
        assert changed.nonzero().tolist() == [[2, 4]]


def test_time_embedding_of_a_unet_is_its_own_also_at_fractional_times(tiny_pipeline):
    unet, given = tiny_pipeline().unet, []
    unet.time_embedding.register_forward_hook(lambda _m, _i, output: given.append(output))
    times = torch.tensor([3.0, 500.25])
    unet(torch.zeros(2, 4, 8, 8), times, encoder_hidden_states=torch.zeros(2, 5, 8))
    embedding = embed_time(unet, times)
    assert torch.equal(embedding, given[0])
    assert not embedding.requires_grad


def test_time_embedding_of_a_transformer_is_its_own(transformer):
    given, times = [], torch.tensor([3.0, 500.25])
    transformer.adaln_single.register_forward_hook(lambda _m, _i, output: given.append(output[1]))
    predict(transformer, torch.randn(2, 4, 8, 8), times, **inputs(2))
    assert torch.equal(embed_time(transformer, times), given[0])
    assert given[0].shape == (2, time_embed_dim(transformer))


def test_recomputation_in_the_backward_pass_keeps_the_gradient(transformer):
    gradients = []
    for checkpointing in (False, True):
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        features = predict(transformer, sample, torch.tensor([7, 700]), **inputs(2)).features
        gradients.append(torch.autograd.grad(sum(f.square().sum() for f in features), sample)[0])
        assert len(features) == 3
    torch.testing.assert_close(*gradients)


def test_latents_of_half_a_patch_are_one_clear_error(tokenizer):
    pipe = build("pixart", tokenizer)
    words = r"latents: .* 2, .*7x8"
    with pytest.raises(ValueError, match=words):
        DiffusionBackbone(pipe).predict(torch.randn(1, 4, 7, 8), torch.tensor([7]))
    # Also before the window of guided steps.
    guidance = ReadoutGuidance([GuidanceTerm(lambda features, _: features[-1].flatten(1).mean(1))], start=0.5)
    for size in ((7, 8), (8, 7)):
        with pytest.raises(ValueError, match=words.replace("7x8", "x".join(map(str, size)))):
            denoise(pipe, "pixart", guidance, latents=torch.randn(2, 4, *size))
    assert not hasattr(denoiser_of(pipe), "_diffusers_hook")
