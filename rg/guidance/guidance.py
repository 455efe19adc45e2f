"""Readout guidance: the gradient of an energy on readouts steers sampling (Luo et al., 2024, section 3.3).

`with guidance.attach(pipe): pipe(...)` works on diffusers pipelines around a U-Net or PixArt's transformer; the
pipeline, its scheduler and its arguments stay the user's own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

from diffusers import DiffusionPipeline
from torch import Tensor

from rg.backbone.denoiser import check_pipeline
from rg.guidance.attach import answering, check_scheduler, shift_scheduler_input
from rg.guidance.step import GuidedStep, RecordedStep, StepTrace
from rg.guidance.targets import FixedTarget, ReferenceTarget
from rg.heads.protocol import EnergyHead, FunctionHead

UPDATES = ("score", "adam")
BRANCHES = ("uncond", "cond", "both")
PRESETS: dict[str, dict[str, Any]] = {
    # The paper's text: the noise prediction moves along the gradient of the unconditional branch.
    "paper": {"update": "score", "branch": "uncond"},
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
        update: "score" adds readout_scale * sqrt(1 - abar_t) * gradient to the noise prediction; "adam" moves x_t by
            one fresh Adam step of learning_rate, then predicts again (DDIM only).
        readout_scale: strength of the score update.
        normalize: None, or "rms": the gradient is first scaled to the RMS of the noise prediction, image by image.
        branch: rows whose features are read. "uncond": under the head's own prompt, which is the pipeline's
            unconditional half when that holds the same prompt, else one more call; "cond": the prompt's; "both".
        start, stop: guided window, as fractions of the executed steps.
        latent_range_factor: multiply energies by ((max x_t - min x_t) / readout span)^2, as the authors' code does.
        checkpointing: less memory for one more forward pass of the guided rows.
        keep_readouts: keep every step's readouts in the trace.
    """

    def __init__(
        self,
        terms: Sequence[GuidanceTerm],
        *,
        update: str = "score",
        readout_scale: float = 1.0,
        learning_rate: float = 2e-2,
        normalize: str | None = None,
        branch: str = "uncond",
        start: float = 0.0,
        stop: float = 1.0,
        latent_range_factor: bool = False,
        checkpointing: bool = False,
        keep_readouts: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("update", update, UPDATES),
            ("branch", branch, BRANCHES),
            ("normalize", normalize, (None, "rms")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= 1, got {start} and {stop}")
        if not terms:
            raise ValueError("terms: expected at least one GuidanceTerm, got none")
        prompts = {term.head.prompt for term in terms} - {None}
        if len(prompts) > 1:
            raise ValueError(f"terms: heads guide together only under one prompt, got {sorted(prompts)}")
        self.prompt: str | None = next(iter(prompts), None)
        self.terms = list(terms)
        self.update = update
        self.readout_scale = readout_scale
        self.learning_rate = learning_rate
        self.normalize = normalize
        self.branch = branch
        self.start = start
        self.stop = stop
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

    @contextmanager
    def attach(self, pipe: DiffusionPipeline) -> Iterator[Self]:
        """Guides every call of `pipe` inside the context; afterwards the pipeline is as it was.

        Raises:
            ValueError: the pipeline or its scheduler has no rule, or a head was made for another backbone.
        """
        check_pipeline(pipe)
        check_scheduler(pipe.scheduler, self.update)
        with answering(pipe, self, GuidedStep) as step:
            shifting = self.update == "adam"
            with shift_scheduler_input(pipe.scheduler, step.pending_shift) if shifting else nullcontext():
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
