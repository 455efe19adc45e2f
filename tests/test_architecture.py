"""Who may know whom, how full a folder may be, and what no file may do: read from the source, nothing is imported."""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rg", "data_prep", "experiments")
FILES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

ANY = None
# file or pattern: (what it may import of the three packages, what it may import from elsewhere beside the standard
# library). "rg.heads" stands for everything below it too. A file that no row fits needs one.
KNOWS: dict[str, tuple[set[str], set[str] | None]] = {
    "rg/points.py": (set(), {"torch"}),
    "rg/models/*": (set(), set()),
    "rg/io/*": ({"rg.io", "rg.points"}, {"torch", "numpy", "PIL", "matplotlib", "pydantic", "safetensors"}),
    "rg/metrics/*": ({"rg.metrics", "rg.points"}, {"torch", "torchmetrics", "scipy"}),
    "rg/detectors/*": ({"rg.detectors", "rg.points", "rg.models", "rg.io"}, {"torch", "safetensors", "transformers"}),
    "rg/data/*": ({"rg.data", "rg.points", "rg.io"}, ANY),
    "rg/backbone/*": ({"rg.backbone", "rg.models", "rg.points", "rg.io"}, ANY),
    "rg/heads/*": ({"rg.heads", "rg.backbone", "rg.metrics", "rg.points", "rg.models", "rg.io"}, ANY),
    "rg/guidance/*": ({"rg.guidance", "rg.backbone", "rg.heads", "rg.io", "rg.points"}, ANY),
    "rg/app/*": ({"rg"}, ANY),
    "rg/distill/*": ({"rg"}, ANY),
    "rg/modular/*": ({"rg.modular", "rg.guidance", "rg.backbone", "rg.heads"}, ANY),
    "rg/*.py": ({"rg"}, ANY),
    "data_prep/sources/sampled.py": (
        {"data_prep.records", "rg.backbone", "rg.data", "rg.generation", "rg.io"},
        set(),
    ),
    "data_prep/annotators/readout.py": (
        {"data_prep.records", "rg.backbone", "rg.data", "rg.heads", "rg.io", "rg.points"},
        {"torch"},
    ),
    "data_prep/annotators/pose/judge.py": ({"data_prep", "rg.detectors.detection", "rg.io"}, {"torch"}),
    "data_prep/*": (
        {"data_prep", "rg.backbone", "rg.cli", "rg.data", "rg.io", "rg.points"},
        ANY,
    ),
    "experiments/*": ({"experiments", "data_prep", "rg"}, ANY),
}
# package: the only files that may import it.
ONLY_IN = {
    "hydra": (
        *("rg/cli.py", "rg/train.py", "rg/sample.py", "rg/evaluate.py", "rg/edit.py", "rg/app/__main__.py"),
        *("rg/distill/__main__.py", "rg/distill/training.py", "data_prep/prepare.py", "experiments/*"),
    ),
    "wandb": ("rg/callbacks.py", "experiments/report/dashboard.py"),
    "matplotlib": ("rg/io/figures.py",),
    "gradio": ("rg/app/*",),
    "rg.app": ("rg/app/*",),
    "rg.train": ("experiments/*", "rg/distill/training.py"),
    "rg.sample": ("experiments/*", "rg/app/*"),
    "rg.evaluate": ("experiments/*",),
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MAX_FUNCTION, MAX_FOLDER = 50, 10  # lines; files


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), filename=file)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(file: str) -> Iterator[str]:
    """Full dotted names that a file imports, also inside functions; `from rg import data` gives rg.data."""
    parts = PurePath(file).parts
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = parts[: len(parts) - node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            members = [f"{module}.{alias.name}" for alias in node.names]
            inner = module.split(".")[0] in PACKAGES
            yield from {member if inner and is_module(member) else module for member in members}


def reach(*files: str) -> set[str]:
    """Files and all files of this repository that importing them imports, at whatever depth."""
    waiting, found = list(files), set()
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        modules = [name.replace(".", "/") for name in imports(file) if name.split(".")[0] in PACKAGES]
        packages = [str(parent) for path in [file, *modules] for parent in PurePath(path).parents if str(parent) != "."]
        named = [*(f"{path}.py" for path in modules), *(f"{path}/__init__.py" for path in [*modules, *packages])]
        waiting += [name for name in named if name in FILES]
    return found


def fits(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


def forbidden_imports(file: str) -> list[str]:
    rows = [row for pattern, row in KNOWS.items() if fnmatchcase(file, pattern)]
    assert rows, f"expected a row of KNOWS for {file}, got none"
    inside, outside = rows[0]
    found = []
    for name in imports(file):
        top = name.split(".")[0]
        if top in PACKAGES:
            allowed = fits(name, inside)
        else:
            allowed = outside is ANY or top in outside or top in sys.stdlib_module_names
        owners = next((files for package, files in ONLY_IN.items() if fits(name, {package})), None)
        if not allowed or (owners and not any(fnmatchcase(file, owner) for owner in owners)):
            found.append(name)
    return found


def calls_that_run_data(file: str) -> list[str]:
    """Calls that can execute or unpack what a data file holds, as "line: call"."""
    found = []
    for node in ast.walk(parse(file)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unpickles = call == "torch.load" and given.get("weights_only") != "True"
        unpickles |= given.get("allow_pickle", "False") != "False"
        if unpickles or call.split(".")[-1] in {"extractall", "unpack_archive"}:
            found.append(f"{node.lineno}: {call}")
    return found


def images_opened(file: str) -> list[str]:
    """Calls that open an image file, as "line: call": rg/io/images.py says which formats, how large, which way up."""
    calls = [node for node in ast.walk(parse(file)) if isinstance(node, ast.Call)]
    named = {f"{node.lineno}: {ast.unparse(node.func)}" for node in calls}
    return [call for call in named if call.split()[1] in {"Image.open", "PIL.Image.open", "cv2.imread", "plt.imread"}]


def long_functions(file: str) -> list[str]:
    functions = [n for n in ast.walk(parse(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{n.lineno}: {n.name}": n.end_lineno - n.lineno + 1 for n in functions}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_FUNCTION]


def test_there_are_files() -> None:
    assert {PurePath(file).parts[0] for file in FILES} == set(PACKAGES)


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_to_the_architecture(file: str) -> None:
    assert not forbidden_imports(file), "imports that KNOWS or ONLY_IN does not allow"
    assert not [name for name in imports(file) if name.split(".")[0] in UNPICKLERS], "unpickling"
    assert not calls_that_run_data(file), "torch.load needs weights_only=True; archives are read member by member"
    assert not images_opened(file) or file == "rg/io/images.py", "images are opened in rg/io/images.py"
    assert not long_functions(file), f"expected at most {MAX_FUNCTION} lines"


def test_images_of_ones_own_need_no_renderer() -> None:
    own = ["data_prep/prepare.py", "data_prep/sources/folders.py"]
    own += [f"data_prep/annotators/{name}.py" for name in ("files", "edges", "tracks", "sdedit", "hed", "midas")]
    own += ["data_prep/annotators/pose/openpose.py"]
    found = reach(*own)
    assert {"data_prep/records.py", "rg/backbone/diffusion.py"} <= found
    assert not [file for file in found if "/marionette" in file]
    assert "data_prep/marionette/render.py" in reach("data_prep/sources/marionette.py")


@pytest.mark.parametrize("folder", sorted({PurePath(file).parent.as_posix() for file in FILES}))
def test_a_folder_can_be_taken_in_at_a_glance(folder: str) -> None:
    modules = [
        file for file in FILES if PurePath(file).parent.as_posix() == folder and not file.endswith("__init__.py")
    ]
    assert len(modules) <= MAX_FOLDER
