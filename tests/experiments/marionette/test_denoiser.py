from typing import Any

import pytest
import torch
from torch import Generator, Tensor
from transformers import CLIPTokenizer

from data_prep.marionette.vocabulary import VOCABULARY
from experiments.marionette.denoiser import EMPTY, Denoiser, draw_timesteps, loss_of, make_scheduler, tokenize
from experiments.marionette.tokenizer import make_tokenizer
from experiments.marionette.trainer import step_generator

CPU = torch.device("cpu")
PROMPTS = ["a person in a red shirt", "two people on grass at dusk"]


@pytest.fixture(scope="module")
def words() -> CLIPTokenizer:
    return make_tokenizer(VOCABULARY, 48)


@pytest.fixture
def denoiser(settings: dict[str, Any], words: CLIPTokenizer) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(settings["denoiser"]["unet"], settings["denoiser"]["text"], words, 16).requires_grad_(False)


def data(words: CLIPTokenizer, *, mean: float = 0.0, std: float = 1.0, levels: list[float]) -> dict[str, Tensor]:
    shape = (2, 4, 16, 16)
    latents = {"mean": torch.full(shape, mean), "spread": torch.full(shape, std)}
    tokens = {"tokens": tokenize(words, PROMPTS), "empty": tokenize(words, [""])}
    return latents | tokens | {"alphas_cumprod": torch.tensor(levels)}


def test_timesteps_are_even_in_a_batch() -> None:
    for seed in range(5):
        drawn = draw_timesteps(20, 1000, Generator().manual_seed(seed))
        assert (drawn.sort().values // 50).tolist() == list(range(20))
        assert drawn.tolist() != drawn.sort().values.tolist()
    many = torch.cat([draw_timesteps(4, 8, Generator().manual_seed(seed)) for seed in range(500)])
    assert many.min() == 0 and many.max() == 7
    assert (torch.bincount(many) / len(many) - 1 / 8).abs().max() < 0.02


def test_tokens_are_padded_to_one_length(words: CLIPTokenizer) -> None:
    tokens = tokenize(words, [*PROMPTS, "", "a person " * 40])
    assert tokens.shape == (4, 48)
    assert (tokens[2, 1:] == words.eos_token_id).all() and tokens[3, -1] == words.eos_token_id


def test_noise_levels_are_stable_diffusions() -> None:
    abar = make_scheduler().alphas_cumprod
    assert len(abar) == 1000 and abar[0] == pytest.approx(1 - 0.00085, abs=1e-6)
    assert abar[-1] == pytest.approx(0.00466, abs=1e-4)


@pytest.mark.parametrize("snr", [0.1, 1.0, 5.0, 20.0, 500.0])
def test_loss_weighs_by_the_capped_signal_to_noise_ratio(denoiser: Denoiser, words: CLIPTokenizer, snr: float) -> None:
    """A network that predicts 0 errs by the noise itself, whose mean square is 1."""
    denoiser.unet.conv_out.weight.zero_()
    denoiser.unet.conv_out.bias.zero_()
    given = data(words, levels=[snr / (1 + snr)])
    loss = loss_of(denoiser, step_generator(0, 0, CPU), data=given, batch_size=64)
    assert loss.item() == pytest.approx(min(snr, 5) / snr, rel=0.03)


def test_latents_are_drawn_with_their_deviation_and_made_noisy(denoiser: Denoiser, words: CLIPTokenizer) -> None:
    seen: list[Tensor] = []
    denoiser.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for level, mean, std in ((1 - 1e-6, 2.0, 0.5), (0.36, 0.6 * 2, (0.36 * 0.25 + 0.64) ** 0.5)):
        given = data(words, mean=2.0, std=0.5, levels=[level])
        loss_of(denoiser, step_generator(0, 0, CPU), data=given, batch_size=32)
        assert seen[-1].mean().item() == pytest.approx(mean, abs=0.02)
        assert seen[-1].std().item() == pytest.approx(std, abs=0.02)


def test_some_prompts_are_left_out(denoiser: Denoiser, words: CLIPTokenizer) -> None:
    seen: list[Tensor] = []
    denoiser.text_encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    given = data(words, levels=[0.5])
    loss_of(denoiser, step_generator(0, 0, CPU), data=given, batch_size=400)
    tokens = seen[0]
    assert (tokens == given["empty"]).all(1).float().mean().item() == pytest.approx(EMPTY, abs=0.05)
    assert all((tokens == prompt).all(1).any() for prompt in given["tokens"])


def test_a_prompt_changes_the_prediction(denoiser: Denoiser, words: CLIPTokenizer) -> None:
    noisy, timesteps = torch.randn(1, 4, 16, 16).expand(2, -1, -1, -1), torch.tensor([500, 500])
    one, other = denoiser(noisy, timesteps, tokenize(words, PROMPTS))
    assert one.shape == (4, 16, 16) and not torch.equal(one, other)
