"""Files that are either whole or not there: written under a temporary name, then put in place."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import torch

from rg.evaluation import write_text

# What a call did for a stage.
Outcome = Literal["done before", "done", "not done yet"]


def save(path: Path, state: Any) -> None:
    """Writes tensors and plain values for torch.load with weights_only=True."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def write_note(path: Path, settings: dict[str, Any], found: dict[str, float]) -> None:
    """Says in JSON that a stage is done, under which settings, and what was measured."""
    write_text(path, {"settings": settings, **found})


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings under which `write_note` has written path; None where it has not."""
    return json.loads(path.read_text(encoding="utf-8"))["settings"] if path.is_file() else None


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether `write_note` has written path under these settings."""
    return read_settings(path) == settings


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change with any weight or setting of a saved model."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
