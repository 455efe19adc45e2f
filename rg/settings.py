"""The types of settings, checked when a configuration is composed: no long work ends at a word where a number belongs.

What a `_target_` takes has the types of its constructor's annotations. TYPES says what those do not: ranges, and the
commands' own settings. One name means one thing, wherever it stands.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from rg.cli import near

Count = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(min_length=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
Words = Annotated[list[Word], Field(min_length=1)]
Row = Annotated[list[Number], Field(min_length=4, max_length=4)]

# What stands beside a `_target_`'s arguments: which trained head an experiment steers with.
BESIDE = ("head.path",)

# Below these any name may be added: a pipeline is loaded before it can say what it takes; judges and methods of one's
# own have names of one's own.
FREE = ("sampling", "methods", "world.detectors")

# What may be a plain value or a call: a rule by name or with settings of its own, none or one of the others.
OR_CALLS = ("guidance.update", "guidance.repeats", "world.classifier")
# What is always a call.
CALLS = ("world.backbone", "data.builder")

# By the end of a setting's dotted name, of which the longest counts; a name with a dot in front has nothing above it.
TYPES: dict[str, Any] = {
    **dict.fromkeys(("seed", ".pose", "warmup_steps", "warm_up", "unseen", "changed", "whole.keypoints"), Index),
    **dict.fromkeys(("images", "batch_size", "epoch_batches", "shard_size", "max_steps", "num_inference_steps"), Count),
    **dict.fromkeys(("resolution", "projection_dim", "norm_groups", "output_scale", "hidden_channels"), Count),
    **dict.fromkeys(
        (
            "edit_steps",
            "encode_batch",
            "edit_batch",
            "steps",
            "training_steps",
            "repeats",
            "head_repeats",
            "latent_side",
        ),
        Count,
    ),
    **dict.fromkeys(("together", "parts", "sheet_images", "held_out", "pictures.train", "workers", "tries"), Count),
    **dict.fromkeys(("tokens", "rounds", "guidance.every", "repeats.times", "pull.points"), Count),
    **dict.fromkeys(("adapter_blocks", "pictures.steps", "pictures.together", "pictures.min_keypoints"), Count),
    **dict.fromkeys(("pictures.timestep",), Index),
    **dict.fromkeys(("pictures.least", "pictures.min_contrast"), Amount),
    **dict.fromkeys(("pictures.head", "pictures.weights", ".adapter"), Word | None),
    **dict.fromkeys(("control_is", ".plain"), Word),
    ".adapters": dict[str, Word],
    "kind": Literal["t2i_adapter", "controlnet"],
    "adapter_middle": bool,
    "length": Positive,
    **dict.fromkeys(
        ("size", "val_size", "val_batch_size", "available", "n", "height", "width", "threads"), Count | None
    ),
    **dict.fromkeys(
        ("denoiser.steps", "check_val_every_n_epoch", "log_every_n_steps", "every_n_train_steps"), Count | None
    ),
    **dict.fromkeys(("encoder_layers", "decoder_layers", ".people"), Count),
    **dict.fromkeys(("layers_per_block", "attention_head_dim", "norm_num_groups", "hidden_size"), Count),
    **dict.fromkeys(("intermediate_size", "num_hidden_layers", "num_attention_heads", "levels", "window"), Count),
    **dict.fromkeys(("widths", "finder_widths", "block_out_channels", "val_timesteps", "counts"), Counts),
    **dict.fromkeys(("learning_rate", "appearance_learning_rate", "preview_minutes", "temperature"), Positive),
    **dict.fromkeys(("line_width", "hardware.gflops", "hardware.memory_gb"), Positive | None),
    **dict.fromkeys(("weight_decay", "contrast", "pose_contrast", "kl_weight", "margin", "repulsion", "gpus"), Amount),
    **dict.fromkeys(("guidance_scale", "scale"), Number),
    "readout_scale": Number | None,
    "sampling.eta": Share | None,
    **dict.fromkeys(("guidance.strength", "update.rho", "update.rate", "update.weight", "update.eta"), Amount),
    "guidance.enough": Amount | None,
    "guidance.repeats": dict[str, Any] | None,
    "guidance.signal_window": Annotated[list[Amount], Field(min_length=2, max_length=2)] | None,
    **dict.fromkeys(("eta", "strength", "validation_share", "test_share", "decay", "ema", "alpha", "least"), Share),
    **dict.fromkeys(("guidance.start", "guidance.stop", "repeats.start", "repeats.stop", "update.share"), Share),
    **dict.fromkeys(("run_dir", "root", "scheduler", "backbone.path", "head.path", "run", "folder", "out"), Word),
    **dict.fromkeys(("output", "cache", "export", "record", "card", "results", "sheet", "stage", "job"), Word),
    **dict.fromkeys(
        ("model", "backbone", "detector", "classifier", "family", "name", "pose_variant", "project", "summary"), Word
    ),
    **dict.fromkeys(("train.experiment", "sample.experiment"), Word),
    **dict.fromkeys(("control", "reference", "device", "head.class", "head.released", "pictures.masks"), Word | None),
    **dict.fromkeys(
        ("pictures.path", "pictures.labels", "entity", "autoencoder.start", ".clip", ".other"), Word | None
    ),
    **dict.fromkeys(("prompt", "edit_prompt"), str | None),
    **dict.fromkeys(("verbose", "check", "sided", "kill", "quick", "make"), bool),
    **dict.fromkeys(("allow_same_judge", "allow_remote"), bool),
    **dict.fromkeys((".host", ".user"), Word),
    ".password": Word | None,
    ".port": Annotated[int, Field(ge=0, lt=2**16)],
    **dict.fromkeys(("limits.seconds", "limits.waiting", "limits.upload"), Count),
    **dict.fromkeys(("precisions", "memory_modes", "checkpoints", "engines", "judges"), Words),
    **dict.fromkeys(("down_block_types", "up_block_types"), Words),
    **dict.fromkeys(("commands.detector", "commands.transformer", "commands.classifier", "commands.card"), Words),
    **dict.fromkeys(("appearance_negatives", "identity_negatives", "kinds"), dict[str, Amount]),
    ".resume": bool | Literal["unfinished"],
    **dict.fromkeys(("_partial_", "_recursive_"), bool),
    "_convert_": Literal["none", "partial", "object", "all"],
    "world.classifier": dict[str, Any] | None,
    "objectives": Annotated[list[Literal["pck", "words"]], Field(min_length=1)],
    "split": Literal["train", "val", "search", "test"],
    "noise": Literal["new", "reference"],
    "update": Literal["score", "adam", "dsg", "freedom", "mpgd", "velocity_norm", "activation"],
    "branch": Literal["uncond", "cond", "both"],
    "normalize": Literal["rms"] | None,
    "negative_prompt": str | list[str] | None,
    "max_minutes": Amount | None,
    "alphas": Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)],
    "scales": Annotated[list[Number], Field(min_length=1)],
    "seeds": Annotated[list[Index], Field(min_length=1)],
    "strengths": Annotated[list[Amount], Field(min_length=1)],
    "overrides": list[Word],
    ".default": Word,
    "drag": Annotated[list[Row], Field(min_length=1)] | None,
    "boxes": Annotated[list[Row], Field(min_length=2, max_length=2)] | None,
    **dict.fromkeys(("only", "tags"), Words | None),
    "terms": Annotated[list[Any], Field(min_length=1)],
    ".models": Words | Word | None,
    ".heads": list[Word] | dict[str, Word],
    "heads": dict[str, Number],
    ".world": Word,
}
TEXTS = (Word, Word | None, str | None, TYPES["negative_prompt"])


@dataclass(frozen=True)
class Signature:
    """What a callable takes: its arguments with their annotations, which of them must be given, and whether it takes
    any others."""

    arguments: dict[str, Any] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    takes_more: bool = False


def check(cfg: DictConfig, added: Sequence[str] = (), removed: Sequence[str] = ()) -> None:
    """Compares every setting of a composed configuration with its type.

    Args:
        cfg: what a command gets; `???` and what cannot be resolved yet are left to those who read them.
        added: dotted names that the command line added to it (+name=value).
        removed: dotted names that it took away (~name).

    Raises:
        ValueError: the first setting of another type or range, with what was expected and found; a `_target_` that
            cannot be imported; a name that nobody reads, with the near ones; one taken away that is needed.
    """
    # As it is written first: a wrong value has the name that it was given by, not of a setting that takes it over.
    settings = OmegaConf.to_container(cfg, resolve=False)
    _check_node(settings, "")
    with suppress(OmegaConfBaseException):
        settings = OmegaConf.to_container(cfg, resolve=True)
        _check_node(settings, "")
    known = ["experiment", "sweep", *_names(settings)]
    # A mapping is as many settings as it holds.
    leaves = [f"{name}{end}" for name in added for end in _ends(OmegaConf.select(cfg, name))]
    for name in leaves:
        parent, _, key = name.rpartition(".")
        holder = OmegaConf.select(cfg, parent) if parent else cfg
        if parent not in FREE and "_target_" not in (holder or {}) and type_of(name) is None:
            others = [other for other in known if other not in leaves and other not in added]
            raise ValueError(f"{name}: no such setting; {near(name, others)}")
    for name in removed:
        parent, _, key = name.rpartition(".")
        owner = (OmegaConf.select(cfg, parent) if parent else None) or {}
        words = re.fullmatch("_.*_", key)  # without them Hydra makes something else of the others
        if "_target_" in owner and (words or key in signature_of(_target(owner["_target_"], parent)).required):
            raise ValueError(f"~{name}: expected {name} to stay, which {owner['_target_']} needs")


def _ends(value: Any) -> Iterator[str]:
    """What follows a setting's name in the names of what it holds: "" of a plain value, a list or a call."""
    if not isinstance(value, DictConfig) or not value or "_target_" in value:
        yield ""
        return
    for key in value:
        yield from (f".{key}{end}" for end in _ends(value[key]))


def check_arguments(function: Callable[..., Any], arguments: dict[str, Any], path: str, closed: bool = False) -> None:
    """Compares keyword arguments with what a callable takes; raises ValueError as `check` does, below `path`.

    Args:
        closed: nothing is taken that is not named, whatever the signature says: pipelines swallow unknown words.
    """
    signature = signature_of(function)
    for key, value in arguments.items():
        name = f"{path}.{key}".lstrip(".")
        if key not in signature.arguments and (closed or not signature.takes_more):
            owner = getattr(function, "__qualname__", type(function).__name__)
            raise ValueError(f"{name}: {owner} takes no such setting; {near(key, list(signature.arguments))}")
        if not _has_calls(value):
            _check_value(name, value, signature.arguments.get(key, Any))


def type_of(name: str) -> Any:
    """What TYPES says of a dotted name; None where it says nothing."""
    parts = name.split(".")
    ends = [f".{name}", *(".".join(parts[start:]) for start in range(len(parts)))]
    return next((TYPES[end] for end in ends if end in TYPES), None)


def is_text(name: str) -> bool:
    """Whether a setting is words as they are, such as a prompt or a path."""
    return type_of(name) in TEXTS


@cache
def signature_of(target: Any) -> Signature:
    """What a callable takes; where it passes **keywords on to its class or to a base, their arguments too."""
    owner = target if inspect.isclass(target) else getattr(target, "__self__", None)
    functions = [] if inspect.isclass(target) else [target]
    if inspect.isclass(owner):
        functions += [vars(base)["__init__"] for base in owner.__mro__ if "__init__" in vars(base)]
    arguments: dict[str, Any] = {}
    required: set[str] = set()
    for function in functions:
        hints = _hints(getattr(function, "__func__", function))
        parameters = list(inspect.signature(function).parameters.values())
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                if parameter.name not in arguments and parameter.default is parameter.empty:
                    required.add(parameter.name)
                arguments.setdefault(parameter.name, hints.get(parameter.name, Any))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return Signature(arguments, frozenset(required))
    return Signature(arguments, frozenset(required), takes_more=True)


def _hints(function: Any) -> dict[str, Any]:
    try:
        return get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only type checkers see
        return {}


def _check_node(node: Any, path: str) -> None:
    if isinstance(node, list):
        for number, value in enumerate(node):
            _check_node(value, f"{path}[{number}]")
        return
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        beside = {name.rpartition(".")[2] for name in BESIDE if name.rpartition(".")[0] == path}
        given = {key: value for key, value in node.items() if not re.fullmatch("_.*_", key) and key not in beside}
        check_arguments(_target(node["_target_"], path), given, path)
    for key, value in node.items():
        name = f"{path}.{key}".lstrip(".")
        kind = type_of(name)
        if name in CALLS and not (isinstance(value, dict) and "_target_" in value):
            raise ValueError(f"{name}: expected {{_target_: module.name, ...}}, found {json.dumps(value)}")
        if isinstance(value, dict) and "_target_" in value and kind not in (None, Word) and name not in OR_CALLS:
            raise ValueError(f"{name}: expected a plain value, found a call of {value['_target_']}")
        if _has_calls(value) or (isinstance(value, dict) and kind in (None, Word)):
            _check_node(value, name)
        elif kind is not None:
            _check_value(name, value, kind)


def _target(name: Any, path: str) -> Any:
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{path}._target_: expected a class or function, found {name!r}: {error}") from error


def _has_calls(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_has_calls, value.values()))
    return isinstance(value, list) and any(map(_has_calls, value))


def _check_value(name: str, value: Any, kind: Any) -> None:
    if kind is Any or (isinstance(value, str) and (value == "???" or "${" in value)):
        return
    try:
        # As JSON a list may be a tuple; strictly, neither "3" nor true is a number, but 3 is one.
        _adapter(kind).validate_json(json.dumps(value), strict=True)
    except PydanticUserError:  # no type that plain values have
        return
    except ValidationError as error:
        said = (problem["msg"].removeprefix("Input should be ") for problem in error.errors(include_url=False))
        expected = " or ".join(dict.fromkeys("null" if words == "None" else words for words in said))
        raise ValueError(f"{name}: expected {expected}, found {json.dumps(value)}") from None


def _adapter(kind: Any) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type with a configuration of its own
        return TypeAdapter(kind)


def _names(node: Any, path: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{path}{key}"
        yield from _names(value, f"{path}{key}.")
