"""How many threads a training that runs beside other work should have."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

STAT = Path("/proc/stat")  # of Linux: seconds of all cores by what they were spent on
WINDOW = 0.5  # seconds, at least, between two looks
SLACK = 0.25  # of a core that others may use without being given it


def threads_beside(busy: float, cores: int, most: int) -> int:
    """Threads, between 1 and `most`, for the cores that others leave; busy: how many cores they use on average."""
    return max(1, min(most, int(cores - busy + SLACK)))


def normal_seconds(stat: str) -> float:
    """What all processes of normal priority have computed since the start of the machine, by the text of /proc/stat."""
    return int(stat.split(maxsplit=2)[1]) / os.sysconf("SC_CLK_TCK")


class SpareThreads:
    """In a process of low priority (`nice`), gives torch as many threads as there are cores that others leave.

    The threads of one product wait for each other, and spin while they do: two of them beside one busy process of
    normal priority take five times as long as one. Anywhere else it leaves the number of threads as it is.

    Args:
        stat: the file that says what all cores did, see `normal_seconds`.
        cores: of the machine.
        niceness: of this process, 0 is normal.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        stat: Path = STAT,
        cores: int | None = None,
        niceness: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stat, self.clock, self.cores = stat, clock, cores or os.cpu_count() or 1
        self.most = torch.get_num_threads()
        self.active = self.most > 1 and (os.nice(0) if niceness is None else niceness) > 0 and stat.is_file()
        self.last = (clock(), self._read()) if self.active else (0.0, 0.0)

    def _read(self) -> float:
        return normal_seconds(self.stat.read_text(encoding="ascii"))

    def adapt(self) -> None:
        """Looks at what others did since the last look."""
        if not self.active or self.clock() - self.last[0] < WINDOW:
            return
        now = (self.clock(), self._read())
        busy = (now[1] - self.last[1]) / (now[0] - self.last[0])
        self.last = now
        torch.set_num_threads(threads_beside(busy, self.cores, self.most))
