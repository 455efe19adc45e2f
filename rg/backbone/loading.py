"""Finds and reads pipelines: a diffusers folder, a shipped model, a single file, or a repository of the model hub."""

import json
import re
import struct
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from rg.io.files import read_json, require_file
from rg.io.records import validate
from rg.models import locate

T = TypeVar("T")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_WEIGHTS = 2**40  # bytes of one file
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Of single files: one of them names a file, whether it is there or not.
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
# Parts of a pipeline's folder that sampling without a safety filter does not need.
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
# What a single file of a whole model holds, by the authors' names: denoiser, autoencoder, and text encoders.
CHECKPOINT = {
    "denoiser": ("model.diffusion_model.",),
    "autoencoder": ("first_stage_model.",),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
# The one file or more that says a component which holds no weights is there.
MARKER_FILES = {
    "Scheduler": "scheduler_config.json",
    "Tokenizer": "tokenizer_config.json",
    "TokenizerFast": "tokenizer_config.json",
}


def load_pipeline(path: str, *, precision: str = "float32", variant: str | None = None) -> DiffusionPipeline:
    """A pipeline with weights of safetensors alone, in evaluation mode on the CPU.

    Args:
        path: a diffusers folder, the name of a shipped model, "owner/name" on the hub, which is downloaded once, or a
            single file, see `load_checkpoint`.
        precision: one of PRECISIONS.
        variant: the files' infix, such as "fp16" in model.fp16.safetensors.

    Raises:
        FileNotFoundError: there is no such folder, the hub does not answer, or a file is missing.
        ValueError: the precision is unknown, or a file is cut short or holds something else.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {sorted(PRECISIONS)}, got {precision!r}")
    if not Path(path).is_dir() and (Path(path).suffix in SUFFIXES or Path(path).is_file()):
        return load_checkpoint(Path(path), PRECISIONS[precision])
    folder = find_pipeline(path, variant)
    parts = check_folder(folder, variant)
    absent: dict[str, Any] = {name: None for name in UNUSED if name in parts}
    if "safety_checker" in absent:
        absent["requires_safety_checker"] = False
    settings = {"dtype": PRECISIONS[precision], "variant": variant, "use_safetensors": True, "local_files_only": True}
    try:
        return DiffusionPipeline.from_pretrained(folder, **settings, **absent)
    except Exception as error:  # the libraries behind tokenizers and weights have errors of their own
        raise ValueError(f"backbone {folder}: cannot be loaded: {_first_line(error)}") from None


def load_checkpoint(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """A pipeline of Stable Diffusion 1, 2 or SDXL from a single file of safetensors in the authors' layout.

    Such a file holds no configuration and no tokenizer: they are those of the folder it lies in, where that has a
    model_index.json, else of the model's repository in the hub's cache or on the hub.

    Raises:
        FileNotFoundError: there is no such file, or its configuration is nowhere.
        ValueError: it is cut short, not safetensors, or not of a whole model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"backbone {path}: expected a file of safetensors, found none")
    if path.suffix != ".safetensors":
        raise ValueError(f"backbone {path}: expected .safetensors, got {path.suffix!r}, which is never unpickled")
    names = _check_length(path)
    missing = [part for part, starts in CHECKPOINT.items() if not any(name.startswith(starts) for name in names)]
    if missing:
        raise ValueError(f"backbone {path}: expected a whole model, found no {' and no '.join(missing)} in it")
    xl = any(name.startswith("conditioner.") for name in names)
    kind = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    absent = {} if xl else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    settings: dict[str, Any] = {"dtype": dtype, **absent}
    if (path.parent / "model_index.json").is_file():
        settings |= {"config": str(path.parent), "local_files_only": True}
    try:
        pipe = kind.from_single_file(str(path), **settings)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise FileNotFoundError(
            f"backbone {path}: expected its configuration beside it (model_index.json, tokenizer/, ...) or on the hub "
            f"or in its cache, which gave {type(error).__name__}: {_first_line(error)}"
        ) from None
    except NotImplementedError:  # torch, of a weight that was never read
        raise ValueError(f"backbone {path}: expected all weights of the model, some are missing") from None
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"backbone {path}: cannot be loaded: {_first_line(error)}") from None
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and any(parameter.is_meta for parameter in part.parameters()):
            raise ValueError(f"backbone {path}: expected all weights of {name}, some are missing")
    return pipe


def find_pipeline(path: str, variant: str | None = None) -> Path:
    """The folder of a pipeline; one that only the hub has is downloaded into its cache first.

    Raises:
        FileNotFoundError: there is no such folder, or the hub does not answer.
    """
    try:
        return locate(path)
    except FileNotFoundError:
        if not HUB_ID.fullmatch(path) or (len(Path(path).parts) > 1 and Path(path).parent.is_dir()):
            raise
    unused = dict.fromkeys(UNUSED)
    try:
        return Path(DiffusionPipeline.download(path, variant=variant, use_safetensors=True, **unused))
    except Exception as error:  # whatever the network, the hub or its cache may raise
        raise FileNotFoundError(
            f"backbone {path}: expected a folder, or a repository in the local cache or on the hub, which gave "
            f"{type(error).__name__}: {_first_line(error)}; with a network, `hf download {path}` fetches it"
        ) from None


def check_folder(folder: Path, variant: str | None = None) -> list[str]:
    """Names of a pipeline's components, each of them complete.

    Raises:
        FileNotFoundError: the folder holds no pipeline, or not all of it.
        ValueError: a file is cut short.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"backbone {folder}: expected a diffusers folder with model_index.json, found none")
    entries = _read_record(index)
    parts = {name: entry for name, entry in entries.items() if isinstance(entry, list) and None not in entry}
    for name, entry in parts.items():
        library, kind = _checked(tuple[str, str], tuple(entry), f"{index}: {name}")
        if name in UNUSED:
            continue
        if not (folder / name).is_dir():
            raise FileNotFoundError(f"backbone {folder}: expected a folder {name} ({library} {kind}), found none")
        mark = next((mark for ending, mark in MARKER_FILES.items() if kind.endswith(ending)), "config.json")
        if not (folder / name / mark).is_file():
            raise FileNotFoundError(f"backbone {folder}: expected {name}/{mark}, found {_listing(folder / name)}")
        for path in sorted((folder / name).glob("*.json")):
            _read_record(path)
        if mark == "config.json":
            _check_weights(folder, name, variant)
    return list(parts)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, constants=True)
    except ValueError as error:
        raise ValueError(f"backbone: {error}") from None
    return _checked(dict[str, Any], content, str(path))


def _checked(schema: type[T], content: object, name: str) -> T:
    try:
        return validate(schema, content, f"backbone: {name}")
    except ValueError as error:
        raise ValueError(str(error)) from None


def _check_weights(folder: Path, name: str, variant: str | None) -> None:
    part, infix = folder / name, "" if variant is None else f".{variant}"
    stems = ("model", "diffusion_pytorch_model")
    indices = [path for stem in stems for path in part.glob(f"{stem}.safetensors.index{infix}.json")]
    files = [part / f"{stem}{infix}.safetensors" for stem in stems]
    files = [path for path in files if path.is_file()]
    if indices and not files:
        weight_map = _read_record(indices[0]).get("weight_map")
        wanted = sorted(set(_checked(dict[str, str], weight_map, f"{indices[0]}: weight_map").values()))
        missing = [file for file in wanted if not (part / file).is_file()]
        if missing:
            raise FileNotFoundError(
                f"backbone {folder}: half downloaded: expected {len(wanted)} files of weights in {name}, "
                f"{missing} are missing"
            )
        files = [part / file for file in wanted]
    if not files:
        raise FileNotFoundError(
            f"backbone {folder}: expected weights {name}/*{infix}.safetensors, found {_listing(part)}"
        )
    for path in files:
        _check_length(path)


def _check_length(path: Path) -> set[str]:
    """Compares a safetensors file's length with what its header says; the names of its tensors."""
    require_file(path, MAX_WEIGHTS)
    found = path.stat().st_size
    try:
        with path.open("rb") as stream:
            (header,) = struct.unpack("<Q", stream.read(8))
            entries = json.loads(stream.read(min(header, found)))
        entries.pop("__metadata__", None)
        expected = 8 + header + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"backbone: {path} is no safetensors file, or cut short after {found} bytes") from None
    if found != expected:
        raise ValueError(f"backbone: {path} is half downloaded: expected {expected} bytes, found {found}")
    return set(entries)


def _listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
