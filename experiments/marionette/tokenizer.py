"""The embedded model's tokenizer: every word of the world is one token, and any other text is spelled in letters."""

import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from transformers import CLIPTokenizer

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
Pair = tuple[str, str]


def merged(parts: list[str], pair: Pair) -> list[str]:
    """Parts of a word with every occurrence of two neighbours made one."""
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def learn_merges(words: Sequence[str]) -> list[Pair]:
    """Byte pair encoding (Sennrich et al., 2016, algorithm 1) until every word is one part.

    Of equally frequent pairs it takes the first in the alphabet: the same words always give the same tokens.
    """
    splits = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[Pair] = []
    while counts := Counter(pair for parts in splits for pair in pairwise(parts)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        splits = [merged(parts, merges[-1]) for parts in splits]
    return merges


def make_tokenizer(vocabulary: Sequence[str], length: int) -> CLIPTokenizer:
    """A CLIPTokenizer that learnt its merges from the vocabulary itself: with no pair left to merge, a word is a token.

    Args:
        vocabulary: lower-case words.
        length: tokens of a prompt, start and end among them; longer prompts are cut off.

    Raises:
        ValueError: a word cannot be one token.
    """
    foreign = [word for word in vocabulary if not set(word) <= set(string.ascii_lowercase)]
    if foreign:
        raise ValueError(f"expected words of lower-case letters alone, got {foreign}: they would be cut in pieces")
    merges = learn_merges(vocabulary)
    # A letter at the end of a word is a token of its own.
    letters = [letter + end for end in ("", WORD_END) for letter in string.ascii_lowercase + string.digits]
    tokens = dict.fromkeys([START, END, *letters, *("".join(pair) for pair in merges)])
    numbers = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=numbers, merges=merges, model_max_length=length)
