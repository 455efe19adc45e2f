"""Readout guidance: the gradient of an energy on readouts steers sampling (Luo et al., 2024, section 3.3).

`with guidance.attach(pipe): pipe(...)` works on diffusers pipelines of the families of rg.backbone.families; the
pipeline, its scheduler and its arguments stay the user's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from diffusers import DiffusionPipeline
from torch import Tensor

from rg.backbone.denoiser import check_pipeline, denoiser_of
from rg.backbone.families import family_of
from rg.guidance.attach import answering, check_scheduler, scheduler_step, shift_scheduler_input
from rg.guidance.rules import RULES, Repeats, Rule, Update, rule_of
from rg.guidance.step import GuidedStep, RecordedStep, StepTrace
from rg.guidance.targets import FixedTarget, ReferenceTarget
from rg.guidance.updates import UNIT
from rg.heads.protocol import EnergyHead, FunctionHead

BRANCHES = ("uncond", "cond", "both")
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's text: the noise prediction moves along the gradient of the unconditional branch.
    "paper": {"update": "score", "branch": "uncond", "readout_scale": 1.0},
    # The authors' code: one Adam step on x_t per timestep, both branches, first half of the steps.
    "released": {"update": "adam", "branch": "both", "latent_range_factor": True, "learning_rate": 2e-2, "stop": 0.5},
}


@dataclass(frozen=True)
class GuidanceTerm:
    """One summand of the energy: weight * head.energy(readout, target, **arguments).

    head: called as head(features, time_embedding). Without a target its result is itself the energy (B,), so that any
        callable on features can guide; a plain function becomes a FunctionHead.
    arguments: what else the energy reads, such as points or boxes; tensors are (1 or B, ...), one per image.

    Raises:
        TypeError: a target, and a head without an energy.
    """

    head: EnergyHead | Callable[[list[Tensor], Tensor | None], Tensor]
    target: FixedTarget | ReferenceTarget | None = None
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.head, EnergyHead):
            object.__setattr__(self, "head", FunctionHead(self.head))
        if self.target is not None and isinstance(self.head, FunctionHead):
            given = type(self.head.function).__name__
            raise TypeError(f"a term with a target needs all of rg.heads.protocol.EnergyHead, got a {given}")


class ReadoutGuidance:
    """Steers a pipeline's sampling by readouts.

    Args:
        terms: summands of the energy.
        update: a rule of rg.guidance.rules.RULES: "score" adds to the noise prediction, "adam" moves x_t by one fresh
            Adam step and predicts again, "dsg", "freedom" and "mpgd" move x_{t-1}, "velocity_norm" the model's
            velocity, "activation" its features. With settings of the rule's own: functools.partial(dsg, share=0.2).
        strength: without a unit: 0 does nothing, 1 is the rule's default, 2 too much.
        readout_scale: of the score rule, in the unit of the energy: the noise prediction gets
            strength * readout_scale * sqrt(1 - abar_t) * gradient. None: the gradient is taken relative to each
            image's first one (rg.guidance.clock.Images.in_units), so that a strength means the same for all heads,
            sizes and numbers of steps.
        learning_rate: of the adam rule.
        normalize: of the score rule; "rms": the gradient is first scaled to the RMS of the noise prediction, image by
            image and step by step, readout_scale (None: 1) is a multiple of that.
        branch: rows whose features are read. "uncond": under the head's own prompt, which is the pipeline's
            unconditional half when that holds the same prompt, else one more call; "cond": the image's own prompt,
            which keeps more of what it asks for (conf/guidance); "both".
        start, stop: guided window, as fractions of the executed steps.
        signal_window: (low, high), guided only where low <= SNR(t) * h * w < high on latents of h x w places: a window
            that fits one size fits others too (rg.guidance.clock.signal).
        every: the gradient is computed at every so many guided steps and held in between.
        enough: an image is left alone once its energy is at most this share of the first that was read; None: never.
        repeats: steps that are taken several times.
        latent_range_factor: multiply energies by ((max x_t - min x_t) / readout span)^2, as the authors' code does.
        checkpointing: less memory for one more forward pass of the guided rows.
        keep_readouts: keep every step's readouts in the trace.
    """

    def __init__(
        self,
        terms: Sequence[GuidanceTerm],
        *,
        update: Update = "score",
        strength: float = 1.0,
        readout_scale: float | None = None,
        learning_rate: float = 2e-2,
        normalize: str | None = None,
        branch: str = "cond",
        start: float = 0.0,
        stop: float = 1.0,
        signal_window: tuple[float, float] | None = None,
        every: int = 1,
        enough: float | None = None,
        repeats: Repeats | None = None,
        latent_range_factor: bool = False,
        checkpointing: bool = False,
        keep_readouts: bool = False,
    ) -> None:
        self.update, self.settings = rule_of(update)
        _check_choices(branch, normalize)
        _check_pace(start, stop, signal_window, every, strength)
        if repeats is not None and not isinstance(repeats, Repeats):
            raise ValueError(f"repeats: expected rg.guidance.Repeats or None, got {repeats!r}")
        if not terms:
            raise ValueError("terms: expected at least one GuidanceTerm, got none")
        prompts = {term.head.prompt for term in terms} - {None}
        if len(prompts) > 1:
            raise ValueError(f"terms: heads guide together only under one prompt, got {sorted(prompts)}")
        self.prompt: str | None = next(iter(prompts), None)
        self.terms = list(terms)
        self.strength = strength
        self.readout_scale = readout_scale
        self.learning_rate = learning_rate
        self.normalize = normalize
        self.branch = branch
        self.start = start
        self.stop = stop
        self.signal_window = signal_window
        self.every = every
        self.enough = enough
        self.repeats = repeats
        self.latent_range_factor = latent_range_factor
        self.checkpointing = checkpointing
        self.keep_readouts = keep_readouts
        self.trace: list[StepTrace] = []

    @classmethod
    def preset(cls, name: str, terms: Sequence[GuidanceTerm], **changes: Any) -> Self:
        """Guidance with the settings of PRESETS[name], changed where `changes` says so."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}")
        return cls(terms, **{**PRESETS[name], **changes})

    @property
    def rule(self) -> Rule:
        """The rule with its strength and settings."""
        rule, settings = RULES[self.update], dict(self.settings)
        raw = self.readout_scale is not None or self.normalize is not None
        if self.update == "score":
            unit = UNIT if not raw else 1.0 if self.readout_scale is None else self.readout_scale
            settings |= {"scale": self.strength * unit, "normalize": self.normalize}
        elif self.update == "adam":
            settings["learning_rate"] = self.strength * self.learning_rate
        else:
            settings["strength"] = self.strength
        in_units = rule.in_units and not (raw and self.update == "score")
        return replace(rule, function=partial(rule.function, **settings), in_units=in_units)

    @property
    def joins_scheduler(self) -> bool:
        """Whether the scheduler's steps are answered too."""
        return self.rule.joins_scheduler or self.repeats is not None

    def check_noise(self, eta: float | None) -> None:
        """Raises ValueError when the rule turns the noise that a call with this `eta` has the scheduler add: none."""
        if self.update == "dsg" and not eta:
            raise ValueError(
                f"eta: update=dsg turns the noise that the scheduler adds; expected above 0, got {eta or 0}"
            )

    @contextmanager
    def attach(self, pipe: DiffusionPipeline) -> Iterator[Self]:
        """Guides every call of `pipe` inside the context; afterwards the pipeline is as it was.

        Raises:
            ValueError: the pipeline or its scheduler has no rule, or a head was made for another backbone.
        """
        check_pipeline(pipe)
        flow = family_of(denoiser_of(pipe)).flow
        check_scheduler(pipe.scheduler, self.update, repeats=self.repeats is not None, flow=flow)
        with answering(pipe, self, GuidedStep) as step, ExitStack() as stack:
            if self.rule.moves == "input":
                stack.enter_context(shift_scheduler_input(pipe.scheduler, step.pending_shift))
            if self.rule.moves == "sample" or self.repeats is not None:
                stack.enter_context(scheduler_step(pipe.scheduler, step.scheduled.answer))
            yield self

    @contextmanager
    def record(self, pipe: DiffusionPipeline) -> Iterator[Self]:
        """Keeps what the terms' heads read of the images that `pipe` makes inside the context, unguided.

        Every ReferenceTarget gets the readouts of the last run, of this guidance's branch and window of steps.
        A run whose text guidance is 1 has no unconditional half: record both branches with guidance_scale=1.0001.

        Raises:
            ValueError: as `attach` does, or no term has a ReferenceTarget.
        """
        if not any(isinstance(term.target, ReferenceTarget) for term in self.terms):
            raise ValueError("terms: expected one with a ReferenceTarget to record, got none")
        check_pipeline(pipe)
        with answering(pipe, self, RecordedStep):
            yield self


def _check_choices(branch: str, normalize: str | None) -> None:
    for name, value, allowed in (("branch", branch, BRANCHES), ("normalize", normalize, (None, "rms"))):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")


def _check_pace(start: float, stop: float, signal_window: Sequence[float] | None, every: int, strength: float) -> None:
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"start, stop: expected 0 <= start <= stop <= 1, got {start} and {stop}")
    if signal_window is not None and not 0 <= signal_window[0] <= signal_window[1]:
        raise ValueError(f"signal_window: expected 0 <= low <= high, got {tuple(signal_window)}")
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    if strength < 0:
        raise ValueError(f"strength: expected at least 0, got {strength}")
