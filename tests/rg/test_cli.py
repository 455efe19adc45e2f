import os
import re
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rg import cli as runs
from rg.cli import clear_errors, point_latest, run_folder


@pytest.fixture(autouse=True)
def in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "_chosen", {})


def ask_again(*arguments):
    """Asks as another process would: without memory of what was chosen before."""
    runs._chosen.clear()
    return run_folder(*arguments)


def make_run(folder, *, finished=False):
    (Path("outputs") / folder).mkdir(parents=True)
    if finished:
        (Path("outputs") / folder / "results.json").write_text("{}")


def code_of(overrides):
    return run_folder("pose", overrides, False)[-8:]


def test_a_run_is_named_by_time_and_overrides():
    folder = run_folder("pose_100", "+experiment=pose_100,seed=1", False)
    assert re.fullmatch(r"pose_100/\d{8}-\d{6}-\d+-[0-9a-f]{8}", folder)
    assert run_folder("pose_100", "+experiment=pose_100,seed=1", False) == folder
    assert run_folder("pose_100", "+experiment=pose_100,seed=2", False)[-8:] != folder[-8:]
    assert ask_again("pose_100", "+experiment=pose_100,seed=1", False)[-8:] == folder[-8:]


def test_jobs_of_one_sweep_have_folders_of_their_own():
    folders = {run_folder("pose", f"seed={seed}", False) for seed in range(20)}
    assert len(folders) == 20


def test_resume_takes_the_newest_run_of_the_same_overrides():
    mine, other = code_of("seed=1"), code_of("seed=2")
    for folder in (f"20200101-000000-{mine}", f"20200102-000000-{mine}", f"20200103-000000-{other}"):
        make_run(f"pose/{folder}")
    Path("outputs/pose/latest").symlink_to(f"20200103-000000-{other}")
    assert ask_again("pose", "seed=1", True) == f"pose/20200102-000000-{mine}"
    assert ask_again("pose", "seed=2", True) == f"pose/20200103-000000-{other}"
    assert ask_again("another", "seed=1", True) not in ("another/latest", f"another/20200102-000000-{mine}")
    assert "2020" not in ask_again("pose", "seed=1", False)


def test_resume_without_an_earlier_run_begins_one():
    assert re.fullmatch(r"pose/\d{8}-\d{6}-\d+-[0-9a-f]{8}", run_folder("pose", "seed=1", True))


def test_unfinished_goes_on_only_where_there_are_no_results():
    code = code_of("")
    make_run(f"pose/20200101-000000-{code}")
    assert ask_again("pose", "", "unfinished") == f"pose/20200101-000000-{code}"
    make_run(f"pose/20200102-000000-{code}", finished=True)
    assert "2020" not in ask_again("pose", "", "unfinished")
    assert ask_again("pose", "", True) == f"pose/20200102-000000-{code}"


def test_another_word_for_resume_is_named():
    with pytest.raises(ValueError, match="resume: expected true, false or unfinished, got 'maybe'"):
        run_folder("pose", "", "maybe")


def test_resolvers():
    config = OmegaConf.create(
        {"dir": "outputs/${run_folder:pose,'a=1,b=2',false}", "id": "${run_id:/x/outputs/pose_100/20200101-000000-abc}"}
    )
    assert config.dir == f"outputs/{run_folder('pose', 'a=1,b=2', False)}"
    assert config.id == "pose_100-20200101-000000-abc"


def test_latest_points_to_the_newest_run(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.md").write_text(name)
        point_latest(tmp_path / name)
        assert (tmp_path / "latest" / "table.md").read_text() == name
    assert os.readlink(tmp_path / "latest") == "second"  # noqa: PTH115  relative: the folder may be moved
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "latest"}


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FloatingPointError])
def test_bad_input_ends_a_command_with_one_line(kind, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    @clear_errors
    def command(word):
        raise kind(f"size={word}: expected 1")

    with pytest.raises(SystemExit, match="^error: size=0: expected 1$"):
        command("0")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(kind):
        command("0")


def test_what_a_constructor_says_is_heard_through_hydra(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    @clear_errors
    def command():
        instantiate({"_target_": "rg.metrics.keypoints.PCK", "alphas": [2.0]})

    with pytest.raises(SystemExit, match=r"^error: expected alphas in \(0, 1\)"):
        command()


def test_our_own_mistakes_keep_their_stack():
    @clear_errors
    def command():
        raise TypeError("mistake")

    with pytest.raises(TypeError):
        command()
    assert clear_errors(lambda word: word)("returned") == "returned"
