from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from data_prep.marionette.scene import KINDS
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.vocabulary import VOCABULARY
from experiments.marionette.tokenizer import END, START, learn_merges, make_tokenizer, merged


@pytest.fixture(scope="module")
def made() -> CLIPTokenizer:
    return make_tokenizer(VOCABULARY, 48)


def test_every_word_is_a_token_of_its_own(made: CLIPTokenizer) -> None:
    tokens = [made(word).input_ids for word in VOCABULARY]
    assert all(len(ids) == 3 and (ids[0], ids[2]) == (made.bos_token_id, made.eos_token_id) for ids in tokens)
    assert len({ids[1] for ids in tokens}) == len(VOCABULARY)
    assert made.convert_tokens_to_ids([START, END]) == [made.bos_token_id, made.eos_token_id]


@pytest.mark.parametrize("text", ["astronaut", "x", "zebra 7", "reddish", "skyscraper42", "Readout"])
def test_foreign_words_are_spelled(made: CLIPTokenizer, text: str) -> None:
    ids = made(text).input_ids[1:-1]
    assert made.unk_token_id not in ids and max(ids) < len(made)
    assert made.decode(ids).replace(" ", "") == text.lower().replace(" ", "")


def test_any_text_gives_tokens(made: CLIPTokenizer) -> None:
    for text in ("", "!?", "größe — 漢字", "a " * 100):
        ids = made(text, padding="max_length", truncation=True).input_ids
        assert len(ids) == 48 and min(ids) >= 0 and max(ids) < len(made)


def test_every_prompt_fits_and_is_known(made: CLIPTokenizer) -> None:
    prompts = [draw_scene((5, index), KINDS).prompt for index in range(300)]
    tokens = made(prompts).input_ids
    assert max(map(len, tokens)) <= 48
    assert all(len(ids) == len(prompt.split()) + 2 for ids, prompt in zip(tokens, prompts, strict=True))


def test_tokens_are_the_same_in_every_process(made: CLIPTokenizer) -> None:
    # A training that goes on finds its words where it left them.
    assert made("a person in a red shirt").input_ids == [0, 38, 161, 147, 38, 166, 171, 1]
    assert make_tokenizer(VOCABULARY, 48).get_vocab() == made.get_vocab()


def test_pairs_are_merged_by_frequency_then_by_the_alphabet() -> None:
    assert learn_merges(["ab", "cab", "cd"]) == [("a", "b</w>"), ("c", "ab</w>"), ("c", "d</w>")]
    assert merged(list("aaab"), ("a", "a")) == ["aa", "a", "b"]


def test_it_survives_saving(made: CLIPTokenizer, tmp_path: Path) -> None:
    made.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a person in a red shirt and an astronaut"
    assert loaded(text).input_ids == made(text).input_ids and loaded.model_max_length == 48


def test_a_word_that_cannot_be_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lower-case.*\['x-ray'\]"):
        make_tokenizer(["red", "x-ray"], 48)
