"""The embedded model's tokenizer: every word of the world is one token, and any other text is spelled in letters."""

import json
import string
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def make_tokenizer(vocabulary: Sequence[str], length: int) -> CLIPTokenizer:
    """A CLIPTokenizer that learnt its merges from the vocabulary itself: with no pair left to merge, a word is a token.

    Args:
        vocabulary: lower-case words.
        length: tokens of a prompt, start and end among them; longer prompts are cut off.

    Raises:
        ValueError: a word did not become one token.
    """
    spelled = Tokenizer(models.BPE(end_of_word_suffix=WORD_END, unk_token=END))
    spelled.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list(string.ascii_lowercase + string.digits)
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        special_tokens=[START, END],
        end_of_word_suffix=WORD_END,
        initial_alphabet=letters,
        show_progress=False,
    )
    # A letter at the end of a word is a token of its own: it must have been seen there.
    spelled.train_from_iterator([*vocabulary, *letters], trainer)
    learnt = json.loads(spelled.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=length)
    split = [word for word in vocabulary if len(tokenizer.tokenize(word)) != 1]
    if split:
        raise ValueError(f"expected every word to be one token, got {split} in pieces: use lower-case letters alone")
    return tokenizer
