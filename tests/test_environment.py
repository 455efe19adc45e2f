"""pyproject.toml, the lock, environment.yml and what the code imports say the same."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("rg", "data_prep", "experiments")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
# Locked, but installed only where they are asked for.
OPTIONAL = [
    Requirement(line)
    for extra in ("ray", "slurm", "app", "search", "dashboard")
    for line in PROJECT["optional-dependencies"][extra]
]
# Needed although no file imports them: why.
INDIRECT = {
    "accelerate": "diffusers loads and offloads models with it",
    "wandb": "lightning's WandbLogger, which conf/logger names",
}
# A CUDA build of torch pins these itself.
CUDA = re.compile(r"cuda-|nvidia-|triton")


def lock() -> dict[str, str]:
    """Package to version, from constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def needed(requirements: list[Requirement]) -> Iterator[Requirement]:
    """The requirements and everything that the installed packages among them require, each once."""
    waiting, seen = list(requirements), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if CUDA.match(requirement.name):
            continue
        yield requirement
        extras = ["", *requirement.extras]
        for line in metadata.requires(requirement.name) or []:
            inner = Requirement(line)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)


def imported() -> set[str]:
    """Distributions that the three packages import or name as a `_target_`."""
    modules = set(re.findall(r"_target_:\s*(\w+)\.", "\n".join(p.read_text() for p in (ROOT / "conf").rglob("*.yaml"))))
    for path in [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.split(".")[0])
    owners = metadata.packages_distributions()
    outside = modules - set(sys.stdlib_module_names) - set(PACKAGES)
    return {canonicalize_name(owners.get(module, [module])[0]) for module in outside}


def test_lock_holds_the_whole_environment() -> None:
    pins = lock()
    wanted = list(needed(CORE + DEV + [requirement for requirement in OPTIONAL if is_installed(requirement.name)]))
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt: {name} is missing"
        assert requirement.specifier.contains(pins[name], prereleases=True), f"{pins[name]} is not {requirement}"
    unneeded = set(pins) - {canonicalize_name(requirement.name) for requirement in wanted}
    assert not set(filter(is_installed, unneeded)), "locked but needed by nothing"
    assert all(canonicalize_name(requirement.name) in pins for requirement in OPTIONAL)


def test_installed_is_what_is_locked() -> None:
    required = {canonicalize_name(requirement.name) for requirement in needed(CORE + DEV)}
    names = {name for name in lock() if name in required or is_installed(name)} - {"setuptools"}
    assert {name: metadata.version(name).split("+")[0] for name in names} == {name: lock()[name] for name in names}


def test_lock_fits_every_machine() -> None:
    for file in ("constraints.txt", "constraints-cpu.txt", "environment.yml", "pyproject.toml", "Makefile"):
        lines = [re.sub(r"#.*", "", line) for line in (ROOT / file).read_text().splitlines()]
        unwanted = [line for line in lines if re.search(r"\+cpu|\+cu\d|https?://|find-links|index-url|file:", line)]
        assert not unwanted, f"{file} names a build, a host or a folder"
    assert "torchvision" not in lock()
    assert "torchvision<0" in (ROOT / "constraints-cpu.txt").read_text().splitlines()


def test_conda_gets_what_make_setup_installs() -> None:
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (python,) = [line.removeprefix("python=") for line in dependencies if str(line).startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    (pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    assert pip == ["-c constraints.txt", "-e .[dev]"]
    assert set(dependencies[:-1]) == {f"python={python}", "pip"}, "packages belong into pyproject.toml"
    makefile = (ROOT / "Makefile").read_text()
    assert "CONSTRAINTS := -c constraints.txt" in makefile
    assert re.search(r"pip install .*\$\(CONSTRAINTS\) -e '\.\[dev\]'", makefile)


def test_declared_is_what_is_imported() -> None:
    declared = {canonicalize_name(requirement.name) for requirement in CORE}
    # Imported where they are used alone: who labels no photographs, or has one machine, does without.
    extras = ("photographs", "ray", "slurm", "app", "dashboard")
    lines = [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    lazy = {canonicalize_name(Requirement(line).name) for line in lines}
    assert imported() - declared == lazy, "imported but not in pyproject.toml, or the other way round"
    assert not declared - imported() - set(INDIRECT), "in pyproject.toml but imported nowhere"
