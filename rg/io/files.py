"""Files that are whole or not there, and what tells saved models apart."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder to write to, which takes the place of `path` at the end.

    Where the writing fails, what was written is removed and `path` stays as it was. No two calls share a temporary
    path, and its name ends in .part, so that nobody who looks for files of the same ending finds it. Folders that are
    missing are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    """Writes plain values as JSON, whole or not at all; raises TypeError for anything else."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change with any weight or setting of a saved model."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
