"""Who may know whom, how long a file may be, and what no file may do: read from the source, nothing is imported."""

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
GUIDANCE = {"rg.denoisers", "rg.hooks", "rg.targets", "rg.guided_step", "rg.schedules", "rg.energies", "rg.recording"}
# What training and guidance both need of a pipeline.
MODEL = {"rg.denoisers", "rg.hooks", "rg.conditions", "rg.pipelines", "rg.precision"}
SHARDS = {"rg.points", "rg.samples", "rg.groups", "rg.shards"}
METRICS = {"rg.metrics", "rg.map_metrics", "rg.image_means"}
# file or pattern: (what it may import of the three packages, what it may import from elsewhere beside the standard
# library). "rg.heads" stands for everything below it too. A file that no row fits needs one.
KNOWS: dict[str, tuple[set[str], set[str] | None]] = {
    "rg/points.py": (set(), {"torch"}),
    "rg/denoisers.py": (set(), {"torch", "diffusers"}),
    "rg/hooks.py": ({"rg.denoisers"}, {"torch", "diffusers", "transformers", "safetensors"}),
    "rg/backbone.py": ({"rg.folders", *MODEL}, {"torch", "diffusers", "transformers", "safetensors"}),
    "rg/folders.py": ({"rg.models"}, {"torch", "diffusers"}),
    "rg/conditions.py": (set(), {"torch"}),
    "rg/pipelines.py": ({"rg.denoisers"}, {"torch"}),
    "rg/precision.py": (set(), {"torch"}),
    "rg/aggregation.py": ({"rg.points"}, {"torch"}),  # a part of readout
    "rg/readout.py": ({"rg.aggregation", "rg.models"}, {"torch", "lightning", "safetensors"}),
    "rg/heads/*.py": ({"rg.readout", "rg.points", "rg.models", "rg.heads", *METRICS}, ANY),
    "rg/released.py": ({"rg.heads", "rg.readout", "rg.points", "rg.released_files"}, {"torch"}),
    "rg/released_files.py": (set(), {"huggingface_hub"}),  # a part of released
    "rg/targets.py": ({"rg.points"}, ANY),
    "rg/guidance.py": (GUIDANCE | MODEL, ANY),
    "rg/guided_step.py": (GUIDANCE | MODEL, ANY),  # this, energies and schedules are parts of guidance
    "rg/recording.py": (GUIDANCE, {"torch"}),
    "rg/inversion.py": ({"rg.backbone"}, {"torch", "diffusers", "tqdm"}),
    "rg/energies.py": ({"rg.denoisers", "rg.targets"}, {"torch"}),
    "rg/schedules.py": (set(), {"torch", "diffusers"}),
    "rg/data.py": (SHARDS, ANY),
    "rg/pictures.py": (set(), {"numpy", "PIL"}),
    "rg/samples.py": (SHARDS, ANY),  # this, groups and shards are parts of data
    "rg/groups.py": (SHARDS, ANY),
    "rg/shards.py": (SHARDS, ANY),
    "rg/metrics.py": ({"rg.points", "rg.image_means"}, ANY),
    "rg/map_metrics.py": ({"rg.image_means"}, {"torch"}),
    "rg/image_means.py": (set(), {"torch", "torchmetrics"}),  # a part of both
    "rg/networks.py": ({"rg.models"}, {"torch", "safetensors"}),
    "rg/finder.py": ({"rg.points", "rg.networks"}, {"torch"}),
    "rg/detectors.py": ({"rg.points", "rg.finder", "rg.networks"}, {"torch"}),
    "rg/classifier.py": ({"rg.networks"}, {"torch"}),
    "rg/models/*.py": (set(), set()),
    "rg/runs.py": ({"rg"}, ANY),
    "rg/sampling.py": ({"rg"}, ANY),  # this and evaluation do the work of their commands
    "rg/evaluation.py": ({"rg"}, ANY),
    "rg/callbacks.py": ({"rg"}, ANY),
    "rg/train.py": ({"rg"}, ANY),
    "rg/sample.py": ({"rg"}, ANY),
    "rg/evaluate.py": ({"rg"}, ANY),
    "rg/edit.py": ({"rg"}, ANY),
    "rg/__init__.py": ({"rg"}, ANY),
    "data_prep/*": ({"data_prep", "rg.data", "rg.backbone", "rg.runs", "rg.pictures", *SHARDS}, ANY),
    "experiments/*": ({"experiments", "data_prep", "rg"}, ANY),
}
# package: the only files that may import it.
ONLY_IN = {
    "hydra": ("rg/train.py", "rg/sample.py", "rg/evaluate.py", "rg/edit.py", "data_prep/prepare.py", "experiments/*"),
    "wandb": ("rg/callbacks.py",),
    "rg.train": ("experiments/*",),
    "rg.sample": ("experiments/*",),
    "rg.evaluate": ("experiments/*",),
}
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MAX_FILE, MAX_FUNCTION = 199, 49  # lines


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


def fits(name: str, allowed: set[str]) -> bool:
    return any(name == entry or name.startswith(entry + ".") for entry in allowed)


def forbidden_imports(file: str) -> list[str]:
    rows = [row for pattern, row in KNOWS.items() if fnmatchcase(file, pattern)]
    assert len(rows) == 1, f"expected one row of KNOWS for {file}, got {len(rows)}"
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
    assert not long_functions(file), f"expected at most {MAX_FUNCTION} lines"
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= MAX_FILE
