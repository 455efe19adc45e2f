import pytest

from experiments.benchmark.engines import run, table, time_parts
from rg.cli import compose_config


def test_a_table_says_whose_bytes_differ():
    row = {"engine": "serial", "workers": None, "killed": False, "seconds": 4.0, "sha256": "a", "n": 2}
    lines = table([row, row | {"engine": "pool", "workers": 2, "killed": True, "seconds": 3.0, "sha256": "b"}])
    assert lines.splitlines()[2:] == [
        "| serial | 1 | 4 | 1.00 | yes |",
        "| pool, one killed | 2 | 3 | 0.75 | NO |",
    ]


@pytest.mark.slow
def test_the_parts_of_a_sample_are_timed_and_a_run_is_what_it_was_asked_for(tmp_path):
    cfg = compose_config("engines", ["n=4", "shard_size=2"])
    parts = time_parts(cfg, count=2)
    assert set(parts) == {"read", "label", "encode", "all", "bytes"} and min(parts.values()) > 0
    assert run(cfg, tmp_path, "serial", None)["n"] == 4
    assert len(list((tmp_path / "serial-None/train").glob("*.tar"))) == 2
