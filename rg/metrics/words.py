"""Whether images show what their prompts say, by what a classifier of attributes reads in them."""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

WORDS = ("shirt", "trousers")


def said(prompt: str, names: Sequence[str] = WORDS) -> dict[str, str]:
    """What a prompt says of each person: the word before each of `names`, "second_NAME" of the second person.

    "a person in a red shirt and blue trousers" -> {"shirt": "red", "trousers": "blue"}; what it does not name is left
    out.
    """
    found = {}
    people = prompt.split("a person")[1:] or [prompt]
    for prefix, words in zip(("", "second_"), people, strict=False):
        for name in names:
            if match := re.search(rf"(\w+) {name}\b", words):
                found[prefix + name] = match[1]
    return found


def fidelity(read: Sequence[Mapping[str, str]], prompts: Sequence[str], names: Sequence[str] = WORDS) -> Tensor:
    """1 for every image in which all of `names` are as its prompt says, 0 for others, nan where it names none: (N,).

    Args:
        read: what was read of each image, name -> word; what is missing is wrong.
    """
    shares = []
    for seen, prompt in zip(read, prompts, strict=True):
        asked = said(prompt, names)
        right = all(seen.get(name) == word for name, word in asked.items())
        shares.append(float(right) if asked else math.nan)
    return torch.tensor(shares)
