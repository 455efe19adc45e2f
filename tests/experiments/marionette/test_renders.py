from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.marionette.render import Stills, render
from experiments.marionette.record import read_seconds
from experiments.marionette.renders import Renders, load_renders


def load(folder: Path, count: int = 5, seed: int = 3, split: str = "train", **settings: Any) -> Renders:
    return load_renders(folder, seed=seed, split=split, count=count, workers=1, **settings)


def render_darker(seeds: Sequence[tuple[int, ...]]) -> Stills:
    stills = render(seeds)
    return replace(stills, image=stills.image // 2)


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}


def test_images_are_those_of_their_seeds_in_order(tmp_path: Path) -> None:
    found = load(tmp_path, per_file=2, chunk=1)
    expected = render([(3, 0, index) for index in range(5)])
    assert torch.equal(found.image, expected.image) and found.prompt == expected.prompt
    assert sorted(path.name for path in tmp_path.rglob("*.npy")) == ["0-2.npy", "2-4.npy", "4-5.npy"]
    assert not list(tmp_path.rglob("*.part*"))
    held_out = load(tmp_path, 1, split="held_out")
    assert torch.equal(held_out.image, render([(3, 1, 0)]).image)
    assert read_seconds(next(tmp_path.glob("*-train"))) > 0


def test_files_are_made_once_and_missing_ones_alone_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    first, before = load(tmp_path, per_file=2), times(tmp_path)
    assert torch.get_num_threads() == threads
    assert " 5/5 " in capsys.readouterr().err  # images, not files
    again = load(tmp_path, per_file=2)
    assert torch.equal(first.image, again.image) and first[1:] == again[1:]
    assert times(tmp_path) == before and not capsys.readouterr().err
    lost = next(path for path in before if path.name == "2-4.npy")
    lost.unlink()
    assert torch.equal(load(tmp_path, per_file=2).image, first.image)
    assert {path for path, time in times(tmp_path).items() if time != before[path]} == {lost}
    assert " 5/5 " in capsys.readouterr().err


def test_another_world_another_seed_and_another_count_have_other_names(tmp_path: Path) -> None:
    first, before = load(tmp_path, 2), times(tmp_path)
    changed = load(tmp_path, 2, renderer=render_darker)
    assert changed.prompt == first.prompt and not torch.equal(changed.image, first.image)
    assert torch.equal(load(tmp_path, 2).image, first.image)
    assert {path: time for path, time in times(tmp_path).items() if path in before} == before
    names = {first.name, changed.name, load(tmp_path, 3).name, load(tmp_path, 2, seed=4).name}
    assert len(names) == 4


@pytest.mark.slow
def test_processes_render_the_same(tmp_path: Path) -> None:
    found = load_renders(tmp_path, seed=3, split="train", count=4, workers=2, per_file=2)
    assert torch.equal(found.image, render([(3, 0, index) for index in range(4)]).image)
