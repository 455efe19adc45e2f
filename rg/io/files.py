"""Files that are whole or not there, files of others that are bounded before they are read, and models told apart."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

MAX_TEXT = 2**20  # bytes of a caption
MAX_JSON = 2**26  # bytes of a record
MAX_DEPTH = 64  # lists and objects inside each other; the parser's own limit is the interpreter's stack


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder to write to, which takes the place of `path` at the end.

    Where the writing fails, what was written is removed and `path` stays as it was; an error of the disk names it. No
    two calls share a temporary path, and its name ends in .part, so that nobody who looks for files of the same ending
    finds it. Folders that are missing are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary), temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: Any) -> None:
    """Writes plain values as JSON, whole or not at all; raises TypeError for anything else."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def require_file(path: Path, limit: int) -> None:
    """Raises ValueError for what is no regular file of at most `limit` bytes: a pipe or a device is not waited for."""
    try:
        if not path.is_file():
            found = "something else" if path.exists() else "none"
            raise ValueError(f"{path}: expected a regular file, found {found}")
        size = path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: expected a regular file, found one that cannot be opened: {error}") from error
    if size > limit:
        raise ValueError(f"{path}: expected at most {limit:,} bytes, found {size:,}")


def read_text(path: Path, limit: int = MAX_TEXT) -> str:
    """Reads text in UTF-8, without the byte order mark that some editors put first.

    Raises:
        ValueError: no regular file, one that cannot be read, of more than `limit` bytes, or not in UTF-8.
    """
    require_file(path, limit)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected text in UTF-8, found {error}") from error


def read_json(path: Path, *, limit: int = MAX_JSON, constants: bool = False) -> Any:
    """Reads what a JSON file holds; see `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit), str(path), constants=constants)


def parse_json(text: str, name: str, *, constants: bool = False) -> Any:
    """The plain values in JSON text; `name` is what errors call it.

    Raises:
        ValueError: the text is no JSON, nests deeper than MAX_DEPTH or, without `constants`, holds NaN or Infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"expected finite numbers, found {constant}")

    if (depth := _depth(text)) > MAX_DEPTH:
        raise ValueError(f"{name}: expected JSON of at most {MAX_DEPTH} levels, found {depth:,}")
    try:
        return json.loads(text, parse_constant=None if constants else refuse)
    except ValueError as error:
        raise ValueError(f"{name}: expected JSON, found none that can be read: {error}") from error


def _depth(text: str) -> int:
    """The most brackets that are open at once, outside of strings; an upper bound where there are few in all."""
    opened = text.count("[") + text.count("{")
    if opened <= MAX_DEPTH:
        return opened
    structure = re.sub(r'"[^"\\]*(?:\\.[^"\\]*)*"', "", text, flags=re.DOTALL).encode("ascii", "replace")
    marks = np.frombuffer(structure, np.uint8) | 32  # [ and { become {, ] and } become }
    steps = (marks == ord("{")).astype(np.int8) - (marks == ord("}")).astype(np.int8)
    return int(np.cumsum(steps, dtype=np.int64).max(initial=0))


def fingerprint(folder: Path) -> str:
    """Sixteen hexadecimal digits that change with any weight or setting of a saved model."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
