"""Files that are either whole or not there: written under a temporary name, then put in place."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from rg.evaluation import write_text


def save(path: Path, state: Any) -> None:
    """Writes tensors and plain values for torch.load with weights_only=True."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def write_note(path: Path, settings: dict[str, Any], found: dict[str, float]) -> None:
    """Says in JSON that a stage is done, under which settings, and what was measured."""
    write_text(path, {"settings": settings, **found})


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether `write_note` has written path under these settings."""
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change with any weight or setting of a saved model."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
