"""The files of a folder, in the order in which people count."""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG

log = logging.getLogger(__name__)

# What operating systems and archives leave in folders, beside names that begin with a dot.
SYSTEM = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}


def natural_key(name: str) -> tuple[list[tuple[int, int]], str]:
    """Sorts numbers in names by their value: frame2 before frame10. Names without numbers of several lengths sort as
    strings do."""
    parts = re.findall(r"[0-9]+|.", name, re.DOTALL)
    return [(ord("0"), int(part)) if part[0] in "0123456789" else (ord(part), 0) for part in parts], name


def printable(name: str) -> str:
    """The name of a file as it can be printed: bytes that are no text become question marks."""
    return os.fsencode(name).decode("utf-8", "replace")


def walk(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """The regular files anywhere below a folder whose names have one of the endings (".png"), in natural order.

    Hidden files and folders, and those of systems, are left out. Symbolic links are followed; a folder to which
    several paths lead is read once, by the path without links where there is one. A folder that cannot be read, or
    that was read already, is named in the log, and so is what has such a name and is no regular file.
    """
    return sorted(_files(folder, endings), key=lambda file: natural_key(file.relative_to(folder).as_posix()))


def _files(folder: Path, endings: tuple[str, ...]) -> Iterator[Path]:
    real, links, seen = [folder], [], set()
    while real or links:
        here = real.pop() if real else links.pop(0)
        try:
            status = here.stat()
            if (identity := (status.st_dev, status.st_ino)) in seen:
                log.warning("%s leads to a folder that is read already: left out", here)
                continue
            seen.add(identity)
            entries = sorted(here.iterdir(), key=lambda entry: natural_key(entry.name))
        except OSError as error:
            log.warning("%s cannot be read: left out: %s", here, error)
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
                continue
            try:
                if entry.is_dir():
                    (links if entry.is_symlink() else real).append(entry)
                    continue
                regular = S_ISREG(entry.stat().st_mode)
            except OSError:  # a link to nowhere, or to itself
                regular = False
            if entry.suffix.lower() in endings:
                if regular:
                    yield entry
                else:
                    log.warning("%s is no regular file: left out", entry)
