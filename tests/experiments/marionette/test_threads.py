import os
from pathlib import Path

import pytest
import torch

from experiments.marionette.threads import SpareThreads, normal_seconds, threads_beside

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize(
    ("busy", "cores", "most", "expected"),
    [
        (0.0, 2, 2, 2), (0.2, 2, 2, 2), (0.3, 2, 2, 1), (1.0, 2, 2, 1), (2.0, 2, 2, 1), (0.0, 8, 2, 2), (3.0, 8, 8, 5),
        (9.0, 8, 8, 1),
    ],
)  # fmt: skip
def test_threads_for_the_cores_that_are_left(busy: float, cores: int, most: int, expected: int) -> None:
    assert threads_beside(busy, cores, most) == expected


def test_seconds_of_normal_priority_are_the_first_number() -> None:
    assert normal_seconds(f"cpu  {250 * TICKS} 999 13 7 0 0\ncpu0 1 2 3\n") == 250


def test_threads_follow_what_others_do_in_a_process_of_low_priority_alone(tmp_path: Path) -> None:
    stat, before, now = tmp_path / "stat", torch.get_num_threads(), [100.0]
    stat.write_text(f"cpu  {1000 * TICKS} 0 0\n")
    try:
        for niceness, expected in ((19, [1, 1, 2, 1]), (0, [2, 2, 2, 2])):  # the second look comes too early
            torch.set_num_threads(2)
            spare, found = SpareThreads(stat=stat, cores=2, niceness=niceness, clock=lambda: now[0]), []
            for seconds, used in ((2, 2), (0.1, 0), (2, 0), (1, 4)):
                now[0] += seconds
                stat.write_text(f"cpu  {round((normal_seconds(stat.read_text()) + used) * TICKS)} 0 0\n")
                spare.adapt()
                found.append(torch.get_num_threads())
            assert found == expected
    finally:
        torch.set_num_threads(before)
