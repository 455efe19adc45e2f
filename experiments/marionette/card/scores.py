"""What the model card counts: pure functions of images, features, confidences and words."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rg.metrics.statistics import kernel_distance

PARTS = 10
Words = Mapping[str, str]  # attribute -> class
Share = dict[str, float]  # {"share", "sem", "count"}


def share(hits: int, count: int) -> Share:
    """A share of `count` cases and its standard error (binomial); a share of no cases is 0."""
    p = hits / count if count else 0.0
    return {"share": p, "sem": math.sqrt(p * (1 - p) / count) if count else 0.0, "count": count}


def psnr(images: Tensor, originals: Tensor) -> float:
    """Mean over images (N, 3, H, W) uint8 of the peak signal-to-noise ratio of each, in dB."""
    error = ((images.double() - originals.double()) / 255).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def distance_to(features: Mapping[str, Tensor], reference: Tensor, parts: int = PARTS) -> dict[str, dict[str, float]]:
    """Kernel distances of sets of features (N, D) to (M, D), and how much larger they are than that of "ceiling".

    Standard errors are the jackknife's: all sets are cut into `parts`, and everything is taken anew without each in
    turn. Sets of the same prompts are cut alike, so that the excess over the ceiling is surer than its two terms.

    Returns:
        set -> {"value", "sem"}, and but for the ceiling itself {"excess", "excess_sem"} too.

    Raises:
        ValueError: fewer than two parts, or than two features per part.
    """
    smallest = min(len(reference), *map(len, features.values()))
    if parts < 2 or smallest < 2 * parts:
        raise ValueError(f"expected 2 parts of 2 images or more, got {smallest} images in {parts}")

    def without(part: int, x: Tensor) -> Tensor:
        return x[torch.arange(len(x)) % parts != part]

    def error(left: Tensor) -> float:
        return math.sqrt((parts - 1) / parts * float((left - left.mean()).square().sum()))

    value = {name: kernel_distance(x, reference) for name, x in features.items()}
    rest = [without(part, reference) for part in range(parts)]
    left = {
        name: torch.tensor([kernel_distance(without(i, x), rest[i]) for i in range(parts)]).double()
        for name, x in features.items()
    }
    found = {name: {"value": value[name], "sem": error(left[name])} for name in features}
    for name in features.keys() - {"ceiling"} if "ceiling" in features else ():
        excess = error(left[name] - left["ceiling"])
        found[name] |= {"excess": value[name] - value["ceiling"], "excess_sem": excess}
    return found


def distances(
    sets: Mapping[str, Tensor], reference: Tensor, embed: Callable[[Tensor], Tensor], parts: int = PARTS
) -> dict[str, dict[str, dict[str, float]]]:
    """Kernel distances of sets of images to a reference: {"raw", "standardised"} -> set -> as of `distance_to`.

    "raw" takes the features as they are, as the evaluation of guidance does. "standardised" gives every feature mean 0
    and variance 1 over the reference first: only these may be compared between two embeddings.
    """
    features = {name: embed(images).double() for name, images in sets.items()}
    goal = embed(reference).double()
    mean, std = goal.mean(0), goal.std(0).clamp_min(1e-6)
    standardised = {name: (x - mean) / std for name, x in features.items()}
    return {
        "raw": distance_to(features, goal, parts),
        "standardised": distance_to(standardised, (goal - mean) / std, parts),
    }


def whole(confidence: Tensor, *, least: float, keypoints: int) -> Tensor:
    """Whether people (..., 18) have at least `keypoints` keypoints of confidence `least` or more: (...) bool."""
    return (confidence >= least).sum(-1) >= keypoints


def named(attributes: Words, prompt: str) -> set[str]:
    """Those attributes of a scene that its prompt tells: all but the hair of people whose hair it leaves out.

    That there is no hat, no glasses and no second person is told by their absence.
    """
    people = zip(("", "second_"), prompt.split("a person")[1:], strict=False)
    bald = [prefix for prefix, words in people if "hair" not in words.split()]
    return set(attributes) - {f"{prefix}{name}" for prefix in bald for name in ("hair", "hair_length")}


def fidelity(read: Sequence[Words], truth: Sequence[Words], prompts: Sequence[str]) -> dict[str, dict[str, Share]]:
    """How often what is read is what the prompt said: {"alone", "two"} -> attribute -> share.

    "two" are images of two people, their attributes taken together; "alone" all others. "all" is over the attributes
    of all images, "every" the share of images in which each named attribute is right.

    Args:
        read: of each image the classes that were read; an attribute that was not read is wrong.
        truth: of each image the classes asked for.
        prompts: only what they name is counted, see `named`.
    """
    hits: dict[str, Counter[str]] = {"alone": Counter(), "two": Counter()}
    counts: dict[str, Counter[str]] = {"alone": Counter(), "two": Counter()}
    for found, asked, prompt in zip(read, truth, prompts, strict=True):
        group = "two" if asked.get("people") == "two" else "alone"
        right = {name: found.get(name) == asked[name] for name in sorted(named(asked, prompt))}
        pairs = [(name.removeprefix("second_"), hit) for name, hit in right.items()]
        for name, hit in [*pairs, *(("all", hit) for hit in right.values()), ("every", all(right.values()))]:
            hits[group][name] += hit
            counts[group][name] += 1
    return {group: {name: share(hits[group][name], n) for name, n in counts[group].items()} for group in hits}


def both(read: Sequence[Words], truth: Sequence[Words], names: tuple[str, ...] = ("shirt", "trousers")) -> Share:
    """How often all of these attributes are right at once."""
    right = [all(found.get(name) == asked[name] for name in names) for found, asked in zip(read, truth, strict=True)]
    return share(sum(right), len(right))


def flips(
    before: Sequence[Words], after: Sequence[Words], truth: Sequence[Words], new: Sequence[str], name: str
) -> Any:
    """What changing one word changed, by what was read of the images before and after.

    Args:
        truth: the classes asked for before; an attribute that it leaves out is not looked at.
        new: the class of attribute `name` asked for after.

    Returns:
        "flipped": the attribute was read as asked for, before and after; "others": no other attribute is read
        differently; "both" at once; and "changed": how often each other attribute is read differently.
    """
    cases = list(zip(before, after, truth, new, strict=True))
    flipped = [b.get(name) == asked[name] and a.get(name) == word for b, a, asked, word in cases]
    changed = [[k for k in asked if k != name and b.get(k) != a.get(k)] for b, a, asked, _ in cases]
    others = [not names for names in changed]
    counts = Counter(k for names in changed for k in names)
    seen = Counter(k for asked in truth for k in asked if k != name)
    return {
        "flipped": share(sum(flipped), len(cases)),
        "others": share(sum(others), len(cases)),
        "both": share(sum(f and o for f, o in zip(flipped, others, strict=True)), len(cases)),
        "changed": {k: share(counts[k], n) for k, n in seen.items()},
    }
