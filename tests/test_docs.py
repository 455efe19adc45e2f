"""README.md and docs/: code runs, commands compose, and what is named is there; test_own_head.py follows one page."""

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import product
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tests.rg.heads.test_released import make_record

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# A block of code; of a file its name stands above it.
BLOCK = re.compile(r"^(?:`([\w./]+)`:\n\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "sh", "yaml", "text", "bibtex"}
OURS = ("rg", "data_prep", "experiments")
PLACES = (*OURS, "conf", "docs", "tests")


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[tuple[str, str, str]]:
    """(file or "", language, code) of every block."""
    return BLOCK.findall(text(page))


def prose(page: str) -> str:
    return BLOCK.sub("", text(page))


def inline(page: str) -> list[str]:
    """Code in the running text, on one line each."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page: str) -> list[str]:
    """Every line of a shell block, continued lines joined, and every command in the running text."""
    shell = "\n".join(code for _, language, code in blocks(page) if language == "sh").replace("\\\n", " ")
    lines = [*shell.splitlines(), *(code for code in inline(page) if code.startswith(("python -m ", "make ")))]
    return list(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: str) -> set[str]:
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)}


def config_name(module: str) -> str:
    """The config of a module's command, read from its source."""
    place = ROOT / module.replace(".", "/")
    path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    assert path.is_file(), f"no module {module}"
    functions = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.FunctionDef)]
    for node in (decorator for function in functions for decorator in function.decorator_list):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "command":
            return ast.literal_eval(node.args[0])
    raise AssertionError(f"expected @command(...) in {module}, found none")


def jobs(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of every job of a sweep; without a sweep, the one job's."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    yield from (list(job) for job in product(*choices))


def first_job(overrides: list[str]) -> list[str]:
    """What the sweep of a +sweep=NAME adds to its first job."""
    files = [ROOT / f"conf/sweep/{word.removeprefix('+sweep=')}.yaml" for word in overrides if "+sweep=" in word]
    params = [OmegaConf.load(file).hydra.sweeper.params for file in files]
    return [f"{key}={str(values).split(',')[0]}" for each in params for key, values in each.items()]


def check_composes(module: str, words: list[str]) -> None:
    import_module(module)  # registers what its config interpolates
    multirun, overrides = "-m" in words, [word for word in words if word != "-m"]
    every, swept = list(jobs(overrides)), first_job(overrides)
    assert multirun or (len(every) == 1 and not swept), "expected -m with a sweep"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in every:
            compose(config_name(module), [*job, *swept])


def test_readme_is_short() -> None:
    assert len(text("README.md").split()) <= 1200


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page: str) -> None:
    assert len(blocks(page)) == len(re.findall(r"^```", text(page), re.MULTILINE)) / 2
    assert {language for _, language, _ in blocks(page)} <= LANGUAGES


# What several pages name is tested once, on the page that has files for it.
COMMANDS = {
    command: page
    for page in sorted(PAGES, key=lambda page: any(name for name, _, _ in blocks(page)))
    for command in commands(page)
}


@pytest.mark.parametrize(
    ("command", "page"),
    # Two hundred compositions take a while: those of the README at every run, the others with the slow tests.
    [pytest.param(*item, id=item[0], marks=[pytest.mark.slow] * (item[1] != "README.md")) for item in COMMANDS.items()],
)
def test_command(command: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: code for name, _, code in blocks(page) if name}
    for name, code in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    match shlex.split(command, comments=True):
        case ["make", target, *settings]:
            makefile = text("Makefile")
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no make target {target}"
            names = [setting.split("=")[0] for setting in settings]
            assert all(re.search(rf"^{name} =", makefile, re.MULTILINE) for name in names), names
        case ["python", "-m", module, *words]:
            assert module.split(".")[0] in OURS, module
            check_composes(module, words)
        case ["python", file]:
            assert file in files, f"the page has no file {file}"
        case _:
            raise AssertionError(f"expected make, python -m or python FILE, found {command}")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_resolve(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.resolve().relative_to(ROOT).as_posix()), link


@pytest.mark.parametrize("page", PAGES)
def test_what_is_named_is_there(page: str) -> None:
    own = {name for name, _, _ in blocks(page)}
    for code in inline(page):
        if code in own:
            continue
        if re.fullmatch(rf"(?:{'|'.join(PLACES)})/[\w./-]*", code):
            assert (ROOT / code).exists(), code
        elif re.fullmatch(rf"(?:{'|'.join(OURS)})(?:\.\w+)+", code):
            resolve_name(code)


SCRIPTS = [
    (page, number)
    for page in PAGES
    for number, (name, language, _) in enumerate(blocks(page))
    if language == "python" and not name
]


@pytest.fixture
def reader_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as a reader has it, in which nothing is left behind, and a head file in the authors' layout."""
    for name in ("rg", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my").mkdir()
    torch.save(make_record(3), tmp_path / "my/pose.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("page", "number"), SCRIPTS)
def test_script_runs(page: str, number: int, reader_folder: Path) -> None:
    names: dict = {}
    exec(compile(blocks(page)[number][2], page, "exec"), names)
    if "guidance" in names:
        energies = [step.energy for step in names["guidance"].trace]
        assert (energies[-1] < energies[0]).all(), page
        assert [image.size for image in names["images"]] == [(64, 64)]
    else:
        assert list(reader_folder.glob("my/*/head.safetensors"))


def test_there_is_something_to_test() -> None:
    assert {page for page, _ in SCRIPTS} == {"README.md", "docs/pipelines.md", "docs/released.md"}
    assert all(commands(page) for page in PAGES)
