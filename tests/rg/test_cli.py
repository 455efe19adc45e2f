import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rg.cli import (
    CONF,
    check_overrides,
    claimed,
    command,
    compose_config,
    explain,
    link_latest,
    one_line_errors,
    quote_texts,
    run_folder,
)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def ask_again(*arguments):
    """Asks as another process would: without memory of what was chosen before."""
    return run_folder(*arguments, chosen={})


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


def test_a_run_is_the_same_with_more_steps():
    make_run(f"pose/20200101-000000-{code_of('+experiment=pose_100,seed=1')}")
    words = "+experiment=pose_100,seed=1,trainer.check_val_every_n_epoch=1,trainer.max_steps=8,verbose=true"
    assert ask_again("pose", words, True) == ask_again("pose", "+experiment=pose_100,seed=1", True)
    assert ask_again("pose", "trainer.max_steps=8", True)[-8:] == code_of("")
    assert code_of("data.batch_size=8") != code_of("")


def test_a_resumed_run_that_never_was_begins_and_says_so(capsys):
    run_folder("pose", "seed=7", "unfinished", {})
    assert not capsys.readouterr().err
    run_folder("pose", "seed=7", True, {})
    assert "outputs/pose" in capsys.readouterr().err


def test_jobs_that_differ_in_steps_alone_have_folders_of_their_own():
    chosen = {}
    assert len({run_folder("pose", f"trainer.max_steps={steps}", False, chosen) for steps in (4, 8, 16)}) == 3


@pytest.mark.parametrize("name", ["pose:v2", "a#b", "../pose", "a//b", "", "two words", "what?"])
def test_a_name_that_no_folder_or_wandb_takes_is_refused(name):
    with pytest.raises(ValueError, match=f"name: .*{re.escape(repr(name))}"):
        run_folder(name, "", False)


@pytest.mark.parametrize("name", ["pose_v2", "sweep/pose-1.5", "größe", "2024"])
def test_other_names_are_taken(name):
    assert run_folder(name, "", False).startswith(f"{name}/")


def test_another_word_for_resume_is_named():
    with pytest.raises(ValueError, match="resume: .*true, false.*unfinished.*'maybe'"):
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
        link_latest(tmp_path / name)
        assert (tmp_path / "latest" / "table.md").read_text() == name
    assert os.readlink(tmp_path / "latest") == "second"  # noqa: PTH115  relative: the folder may be moved
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "latest"}


def test_a_folder_called_latest_is_left_alone(tmp_path, capsys):
    for name in ("latest", "first"):
        (tmp_path / name).mkdir()
    link_latest(tmp_path / "first")
    assert not (tmp_path / "latest").is_symlink() and f"{tmp_path}/latest" in capsys.readouterr().err


def test_without_links_the_run_stands(tmp_path, capsys):
    (tmp_path / "first").mkdir()
    (tmp_path / f".latest-{os.getpid()}").mkdir()  # no link can be made under this name
    link_latest(tmp_path / "first")
    assert f"{tmp_path}/first" in capsys.readouterr().err


def raises(error):
    def function():
        raise error

    return function


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, FloatingPointError])
def test_bad_input_ends_a_command_with_one_line(kind):
    error = kind("size=0: expected 1")
    with pytest.raises(SystemExit, match="^error: size=0: expected 1$"):
        one_line_errors(raises(error))()
    with pytest.raises(kind):
        one_line_errors(raises(error), stack=True)()


def test_what_a_constructor_says_is_heard_through_hydra():
    @one_line_errors
    def function():
        instantiate({"_target_": "rg.metrics.keypoints.PCK", "alphas": [2.0]})

    with pytest.raises(SystemExit, match=r"^error: alphas: .*\(0, 1\).*\[2\.0\]"):
        function()


def test_our_own_mistakes_keep_their_stack():
    with pytest.raises(TypeError):
        one_line_errors(raises(TypeError("mistake")))()
    assert one_line_errors(lambda word: word)("returned") == "returned"


def test_too_little_memory_is_said_in_one_line():
    with pytest.raises(SystemExit, match="^error: memory: expected enough .* tried to allocate"):
        one_line_errors(lambda: torch.empty(2**60))()


@pytest.mark.parametrize(
    ("config", "word", "parts"),
    [
        ("train", "world=sd4", ["world=sd4", "sdxl", "sd35"]),
        ("train", "data=poze", ["data=poze", "pose"]),
        ("train", "+experiment=pose_10", ["experiment=pose_10", "pose_100", "pose_1k"]),
        ("train", "experiment=pose_100", ["+experiment=pose_100"]),
        ("sample", "+experiment=pose_100", ["+experiment=pose_100", "python -m rg.train"]),
        ("train", "recipe@data.builder=folder_pose", ["pictures=folder", "pictures.path", "pictures.labels"]),
        ("edit", "heads=[appearance]", ["terms=[appearance]"]),
        ("prepare", "root=my/data", ["data.builder.root"]),
        ("experiments/benchmark", "sizes=tpu", ["sizes=tpu", "cpu", "gpu"]),
        ("train", "pictures=null", ["pictures=null", "folder", "rendered"]),
    ],
)
def test_a_word_that_cannot_be_is_answered_with_what_can(config, word, parts):
    with pytest.raises(ValueError) as caught:
        check_overrides(config, ["seed=1", word])
    assert not [part for part in parts if part not in str(caught.value)], caught.value


def test_words_that_can_be_are_left_to_hydra():
    check_overrides("train", ["world=sdxl", "+experiment=pose_100", "data.size=3", "pictures=folder"])
    check_overrides("train", ["-m", "+experiment=pose_100,pose_1k"])
    check_overrides("evaluate", ["+experiment=pose_control"])
    check_overrides("cost", ["+experiment=pose_control", "world=sdxl"])


def test_what_a_resolver_refuses_is_said_alone():
    text = "ValueError raised while resolving interpolation: name: expected x, got 'a:b'\n    full_key: hydra.run.dir\n"
    assert explain("train", ValueError(text), []) == "name: expected x, got 'a:b'"


def test_a_setting_that_is_itself_is_named():
    text = explain("train", ValueError("Recursive interpolation detected\n full_key: hydra.run.dir"), ["seed=${seed}"])
    assert text == "seed=${seed}: expected a value that does not lead back to itself"


def test_an_unknown_setting_is_answered_with_near_ones():
    error = ValueError("Could not override 'data.sise'.")
    text = explain("train", error, ["data.sise=3", "data=depth"])
    assert "data.sise" in text and "data.size" in text


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("prompt=a person, on grass", "a person, on grass"),
        ("prompt=a person (left)", "a person (left)"),
        ("prompt=it's {dusk}: 1=1", "it's {dusk}: 1=1"),
        ("prompt=\\", "\\"),
        ("prompt=12", "12"),
        ("prompt=null", None),
        ("prompt=", ""),
        ("prompt='a, b'", "a, b"),
        ("control=my images (2), new/x.png", "my images (2), new/x.png"),
        ("name=2024", "2024"),
    ],
)
def test_texts_are_taken_as_they_are(word, value):
    (quoted,) = quote_texts([word])
    assert compose_config("sample", [quoted])[word.partition("=")[0]] == value
    sweep = ["-m", word]
    assert quote_texts(sweep) == sweep


def test_other_words_are_left_to_hydra_as_they_are():
    words = ["images=4", "guidance=pose", "+experiment=pose_control", "alphas=[0.1,0.2]", "~logger.wandb", "seed=1,2"]
    assert quote_texts([*words, "head.path=a/b", "+sampling.negative_prompt=[a,b]"])[:6] == words


COMMANDS = sorted(
    path.relative_to(CONF.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__main__")
    for package in ("rg", "data_prep", "experiments")
    for path in (CONF.parent / package).rglob("*.py")
    if re.search(r"^@command\(", path.read_text(), re.MULTILINE)
)
CODE = """
from rg.cli import command
command("experiments/ship")(lambda cfg: print("works"))()
"""


def run(*words):
    return subprocess.run([sys.executable, *words], cwd=CONF.parent, capture_output=True, text=True, check=False)


def test_every_command_answers_help_without_torch():
    assert {"rg.train", "data_prep.prepare", "experiments.quality.heads"} <= set(COMMANDS)
    for module in COMMANDS:
        found = run("-X", "importtime", "-m", module, "--help")
        assert found.returncode == 0 and f"python -m {module}" in found.stdout, found
        assert "| torch" not in found.stderr and "| numpy" not in found.stderr, module
    text = run("-m", "rg.train", "--help").stdout
    assert "world=marionette|flux|pixart" in text and "data.batch_size=" in text


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("data.sise=3", ["data.sise", "data.size"]),
        ("world=sd4", ["world=sd4", "sdxl"]),
        ("data.size=1,2", ["data.size=1,2"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(word, parts, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train", word])
    with pytest.raises(SystemExit) as caught:
        command("train")(lambda cfg: pytest.fail("a mistake reached the command"))()
    line = str(caught.value)
    assert line.startswith("error: ") and "\n" not in line and not capfd.readouterr().err
    assert not [part for part in parts if part not in line], line


def test_a_mistake_of_a_process_is_one_line_on_stderr():
    found = run("-c", CODE, "run=x", "nam=y")
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1 and not found.stdout, found
    assert "nam" in found.stderr and "name" in found.stderr


def test_a_command_is_stopped_while_it_is_loaded():
    process = subprocess.Popen(
        [sys.executable, "-m", "rg.train"],
        cwd=CONF.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    maps = Path(f"/proc/{process.pid}/maps")
    if maps.exists():  # of Linux, and says which libraries are being loaded
        while "libtorch" not in maps.read_text():
            time.sleep(0.01)
    else:
        time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and errors.count("\n") <= 2 and "Traceback" not in errors


def test_a_setting_of_another_type_ends_a_command_with_one_line():
    found = run("-c", CODE, "run=x", "name=y", "models=3")
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1, found
    assert found.stderr.startswith("error: models: ") and found.stderr.endswith("found 3\n")


NOISY = """
import logging, warnings
from rg.cli import command
@command("experiments/ship")
def main(cfg):
    for name in ("__main__", "rg.train", "matplotlib.category", "lightning.pytorch.utilities.rank_zero", "PIL"):
        logging.getLogger(name).info("said by %s", name)
    logging.getLogger("PIL").warning("a warning")
    warnings.warn("old", DeprecationWarning)
    warnings.warn("of use")
main()
"""


@pytest.mark.slow
def test_libraries_are_quiet_unless_they_are_asked():
    quiet, loud = (run("-c", NOISY, "run=x", "name=y", f"verbose={verbose}") for verbose in ("false", "true"))
    said = [re.findall(r"said by (\S+)|(a warning|old|of use)$", r.stdout + r.stderr, re.M) for r in (quiet, loud)]
    quiet, loud = ({name or word for name, word in found} for found in said)
    assert quiet == {"__main__", "rg.train", "a warning", "of use"}
    assert loud >= quiet | {"matplotlib.category", "PIL"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_says_what_is_kept(number, tmp_path):
    context = multiprocessing.get_context("fork")  # what a command imports is here already
    working = context.Event()

    @command("experiments/ship", stopped="two shards are kept")
    def main(cfg):
        working.set()
        signal.pause()

    def process():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job of a shell lacks
        sys.argv = ["ship", "run=x", "name=y"]
        with (tmp_path / "errors").open("w") as sys.stderr:
            main()

    stopped = context.Process(target=process)
    stopped.start()
    assert working.wait(60)
    time.sleep(0.1)
    os.kill(stopped.pid, number)
    stopped.join(60)
    assert stopped.exitcode == 130 and (tmp_path / "errors").read_text() == "\nstopped: two shards are kept\n"


def test_a_folder_takes_one_process(tmp_path):
    other = claimed(tmp_path / "run")
    with claimed(tmp_path / "run"), pytest.raises(ValueError, match=rf"^{tmp_path}/run: .*another process"):
        other.__enter__()
    with claimed(tmp_path / "run"):
        pass


def test_what_the_disk_refuses_and_names_of_several_lines_are_one_line():
    def fail(error):
        raise error

    for error in (OSError(28, "No space left on device", "a/b"), ValueError("line\nbreak.png: expected an image")):
        with pytest.raises(SystemExit) as caught:
            one_line_errors(fail)(error)
        assert "\n" not in str(caught.value) and ("a/b" in str(caught.value) or r"line\nbreak" in str(caught.value))


def test_choices_that_are_none_and_endless_brackets_are_named():
    with pytest.raises(ValueError, match=r"prompt=\[\[.*at most 32.* found 200"):
        check_overrides("sample", ["prompt=" + "[" * 200 + "]" * 200])
    check_overrides("edit", ["drag=[" + ",".join(["[1,2,3,4]"] * 200) + "]"])
    with pytest.raises(HydraException) as caught:
        compose_config("sample", ["head="])
    assert explain("sample", caught.value, ["head="]).startswith("head: no such setting; did you mean ")


@pytest.mark.slow
def test_libraries_say_nothing_while_they_are_loaded():
    found = run("-m", "rg.sample", "+experiment=pose_control", "control=nowhere.json")
    assert found.returncode == 1 and len(found.stderr.splitlines()) == 1 and "nowhere.json" in found.stderr, found
