"""The table of adapters beside guidance, of records that are written here."""

import pytest
import torch

from experiments.adapters import compare, rows_of, table
from rg.io.files import write_json

ALPHAS = ("0.05", "0.1")


def write(run, unguided, guided, prompt="a person"):
    for number, shares in enumerate(zip(unguided, guided, strict=True)):
        judged = {
            condition: {"pck": {"target": dict.fromkeys(ALPHAS, share)}}
            for condition, share in zip(("unguided", "guided"), shares, strict=True)
        }
        record = {"prompt": prompt, "seconds": {"unguided": 1.0, "guided": 4.0}, "judges": {"hourglass": judged}}
        write_json(run / "samples" / f"{number:05d}.json", record)
    write_json(run / "results.json", {"command": f"python -m rg.evaluate name={run.name}"})


def test_differences_are_paired():
    found = compare(torch.tensor([0.5, 0.7, 0.9]), torch.tensor([0.1, 0.3, 0.5]))
    assert found["difference"] == pytest.approx(0.4) and found["sem"] == pytest.approx(0, abs=1e-7)
    spread = compare(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
    assert spread["sem"] == pytest.approx(0.5)  # 0.7071 / sqrt(2)
    assert spread["high"] - spread["difference"] == pytest.approx(12.7062 * 0.5, rel=1e-4)  # Student's t, 1 degree
    assert compare(torch.tensor([1.0, float("nan"), 0.0]), torch.zeros(3)) == spread
    with pytest.raises(ValueError, match="found 1 and 2"):
        compare(torch.zeros(1), torch.zeros(2))


def test_every_condition_is_compared_with_unguided(tmp_path):
    write(tmp_path / "plain", [0.0, 0.2], [0.4, 0.8])
    write(tmp_path / "adapted", [0.5, 0.7], [1.0, 1.0])
    rows = rows_of(tmp_path / "plain", {"distilled": tmp_path / "adapted"})
    assert [(row["name"], row["metric"]) for row in rows[::2]] == [
        ("guided", "PCK@0.05 hourglass"),
        ("distilled", "PCK@0.05 hourglass"),
        ("distilled + guidance", "PCK@0.05 hourglass"),
    ]
    assert [row["ours"] for row in rows[::2]] == pytest.approx([0.6, 0.6, 1.0])
    assert all(row["baseline"] == pytest.approx(0.1) for row in rows)
    assert [row["seconds"] for row in rows[::2]] == [4.0, 1.0, 4.0]
    assert rows[2]["command"].endswith("name=adapted") and "| distilled | PCK@0.1 hourglass |" in table(rows)
    write(tmp_path / "other", [0.5, 0.7], [1.0, 1.0], prompt="a dog")
    with pytest.raises(ValueError, match="expected the poses and prompts of"):
        rows_of(tmp_path / "plain", {"distilled": tmp_path / "other"})
    with pytest.raises(FileNotFoundError, match="expected a finished evaluation"):
        rows_of(tmp_path / "none", {})
