"""Runs a reader of a file or setting in a process of its own and says how it ended."""

import json
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

CLEAR, SKIPPED, EQUAL, DIFFERENT = "clear error", "skipped and counted", "equal", "silently different"
FOREIGN, HANG, KILLED = "foreign stack", "hang", "killed"
PROGRAM, OUTSIDE = "other program started", "written outside"
OUTCOMES = (CLEAR, SKIPPED, EQUAL, DIFFERENT, FOREIGN, HANG, KILLED, PROGRAM, OUTSIDE)
BAD = (FOREIGN, HANG, KILLED, PROGRAM, OUTSIDE)

PROGRAMS = ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.fork", "pty.spawn", "socket.connect")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MEMORY = 3 * 2**30  # bytes that a reader may take beside what is loaded


class Outcome(NamedTuple):
    """How a case ended, and what was said or found."""

    name: str
    detail: str


@dataclass
class Report:
    """What a reader returns: its content, and what it left out by name."""

    content: Any
    left_out: Sequence[str] = ()


def run(
    read: Callable[[], Any], folder: Path, named: Sequence[str], expected: str | None, seconds: float = 20
) -> Outcome:
    """Runs a reader in `folder`; a clear error has one line with one of the `named`.

    Args:
        read: raises, or returns a content or Report.
        expected: digest of the content without the mutation; None: any is right.
    """
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _in_child(read, folder, named, expected, send)
    os.close(send)
    said, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and select.select([receive], [], [], max(end - time.monotonic(), 0))[0]:
        part = os.read(receive, 2**16)
        said += part
        if not part:
            break
    else:
        os.kill(child, signal.SIGKILL)
    os.close(receive)
    status = os.waitpid(child, 0)[1]
    if not said:
        slow = time.monotonic() >= end
        return Outcome(HANG if slow else KILLED, f"{seconds} s" if slow else f"status {status}")
    return Outcome(*json.loads(said))


def _in_child(read: Callable[[], Any], folder: Path, named: Sequence[str], expected: str | None, send: int) -> None:
    outcome = Outcome(KILLED, "the watch itself")
    try:
        outcome = _watched(read, folder, named, expected)
    except BaseException as error:
        outcome = Outcome(FOREIGN, f"while it was watched: {error!r}")
    finally:
        os.write(send, json.dumps(outcome).encode())
        os._exit(0)


def _watched(read: Callable[[], Any], folder: Path, named: Sequence[str], expected: str | None) -> Outcome:
    os.setsid()
    os.chdir(folder)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.dont_write_bytecode = True
    tempfile.tempdir = str(folder)
    warnings, seen = _Warnings(), _Seen(folder)
    logging.getLogger().addHandler(warnings)
    sys.addaudithook(seen)
    try:
        found = read()
        seen.over = True
        report = found if isinstance(found, Report) else Report(found)
        said = [*report.left_out, *(text for text in warnings.said if any(name in text for name in named))]
        name = EQUAL if expected in (None, digest(report.content)) else SKIPPED if said else DIFFERENT
        outcome = Outcome(name, " | ".join(said)[:300])
    except BaseException as error:
        seen.over = True
        outcome = judge(error, named)
    return Outcome(*seen.found[0]) if seen.found else outcome


def judge(error: BaseException, named: Sequence[str]) -> Outcome:
    """Whether an error is one clear line."""
    # Hydra wraps what a constructor raises; a command exits with the line that it prints.
    causes = [error, error.__cause__]
    clear = [e for e in causes if isinstance(e, ValueError | FileNotFoundError | FloatingPointError)]
    if isinstance(error, SystemExit) and str(error).startswith("error: "):
        clear = [error]
    text = str(clear[0] if clear else error)
    if clear and "\n" not in text and any(name in text for name in named):
        return Outcome(CLEAR, text[:300])
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = "" if place is None else f" ({place.tb_frame.f_code.co_filename}:{place.tb_lineno})"
    return Outcome(FOREIGN, f"{type(error).__name__}: {text[:300]!r}{where}")


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class _Seen:
    """An audit hook that keeps which programs were started and what was written outside of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.over = str(folder.resolve()), [], False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.over:
            return
        if event in PROGRAMS:
            self.found.append((PROGRAM, f"{event} {arguments[:2]!r}"[:300]))
        changed = event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING)
        places = {"os.rename": arguments[:2], "os.link": arguments[1:2], "os.symlink": arguments[1:2]}
        for place in places.get(event, arguments[:1]) if changed else ():
            if isinstance(place, str | bytes | os.PathLike):
                path = os.path.abspath(os.fsdecode(place))  # noqa: PTH100  no link is followed
                if path != self.folder and not path.startswith((f"{self.folder}/", "/dev/")):
                    self.found.append((OUTSIDE, f"{event} {path}"[:300]))


def digest(content: Any) -> str:
    """The same for the same content."""
    from rg.callbacks import digest as of_values

    return of_values(content)


def prepare() -> None:
    """What the process that runs cases does once: one thread, as a forked process has no others."""
    torch.set_num_threads(1)
