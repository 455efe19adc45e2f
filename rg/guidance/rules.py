"""Guidance's rules by name: what each of them moves, and the settings that are its own."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rg.guidance.updates import activation, adam, dsg, freedom, mpgd, score, velocity_norm

Moves = Literal["output", "input", "sample", "features"]


@dataclass(frozen=True)
class Rule:
    """A pure function of rg/guidance/updates.py and how a step calls it.

    moves: the denoiser's "output" (function(gradient, output, x_t, abar)), its "input" x_t (function(gradient)), the
        "sample" x_{t-1} (function(gradient, transition)), or its "features" (function(feature, gradient), tap by tap).
    settings: those of its own. ReadoutGuidance has score's and adam's, and every rule's strength.
    in_units: it depends on the gradient's size, which is then taken relative to each image's first one.
    """

    function: Callable[..., Tensor]
    moves: Moves
    settings: tuple[str, ...] = ()
    in_units: bool = False

    @property
    def joins_scheduler(self) -> bool:
        """Whether it takes part in the scheduler's step."""
        return self.moves in ("input", "sample")


RULES = {
    "score": Rule(score, "output", in_units=True),
    "adam": Rule(adam, "input"),
    "dsg": Rule(dsg, "sample", ("share",)),
    "freedom": Rule(freedom, "sample", ("rho",), in_units=True),
    "mpgd": Rule(mpgd, "sample", ("rate",), in_units=True),
    "velocity_norm": Rule(velocity_norm, "output", ("weight",)),
    "activation": Rule(activation, "features", ("eta",)),
}
# A rule by its name, or its function with settings of its own: functools.partial(dsg, share=0.2).
Update = str | functools.partial[Tensor]


@dataclass(frozen=True)
class Repeats:
    """Each step between two fractions of the steps is taken `times` times, with noise added anew in between.

    x_t = sqrt(a) x_{t-1} + sqrt(1 - a) noise with a = abar_t / abar_{t-1}: FreeDoM's time travel (Yu et al., 2023,
    algorithm 2), TFG's recurrence. DDIM only.

    Raises:
        ValueError: times below 1, or not 0 <= start <= stop <= 1.
    """

    times: int = 2
    start: float = 0.3
    stop: float = 0.7

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"repeats.times: expected at least 1, got {self.times}")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"repeats: expected 0 <= start <= stop <= 1, got {self.start} and {self.stop}")


def rule_of(update: Update) -> tuple[str, Mapping[str, Any]]:
    """The name of a rule and the settings that are given for it.

    Raises:
        ValueError: there is no such rule, or it takes no such setting.
    """
    name, settings = update, {}
    if isinstance(update, functools.partial):
        names = {rule.function: name for name, rule in RULES.items()}
        name, settings = names.get(update.func, update.func), update.keywords
    if name not in RULES:
        raise ValueError(f"update: expected one of {tuple(RULES)}, got {name!r}")
    if unknown := sorted(set(settings) - set(RULES[name].settings)):
        raise ValueError(f"update: {name} takes {RULES[name].settings}, got {unknown}")
    return name, settings
