"""Every yaml under conf/ names its command, fits the signatures it calls, and composes with the command's config."""

import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
FILES = sorted(path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml"))
WORLDS = sorted(path.stem for path in CONF.glob("world/[!_]*.yaml"))
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))
SWEEPS = sorted(path.stem for path in CONF.glob("sweep/*.yaml") if path.stem != "wandb_bayes")
RECIPES = sorted((f"pictures={path.parent.name}", f"data={path.stem}") for path in CONF.glob("recipe/*/*.yaml"))
INSTRUCTIONS = {"defaults", "_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
# Arguments that rg.train reads off the backbone and gives to the head itself.
GIVEN = ("tap_channels", "time_embed_dim")
# config: the module of its command, which registers what the config interpolates.
COMMANDS = {"train": "rg.train", "sample": "rg.sample", "evaluate": "rg.evaluate", "edit": "rg.edit"}
COMMANDS |= {"prepare": "data_prep.prepare", "distill": "rg.distill.__main__"}


def command(file: str) -> tuple[str | None, str | None]:
    """The module and the make target in the comment on top of a yaml: one of the two, or neither."""
    lines = (CONF / file).read_text(encoding="utf-8").splitlines()
    found = re.match(r"# .*?(?:python -m ([\w.]+)|make ([a-z-]+))", lines[lines[0].startswith("# @package")])
    return (found[1], found[2]) if found else (None, None)


def config_of(file: str) -> str:
    """The config that an experiment or sweep extends: that of the command on top of it, else train's."""
    module, _ = command(f"{file}.yaml")
    return next((config for config, owner in COMMANDS.items() if owner.removesuffix(".__main__") == module), "train")


def first_values(sweep: str) -> list[str]:
    """The overrides of a sweep's first job."""
    params = OmegaConf.load(CONF / f"sweep/{sweep}.yaml").hydra.sweeper.params
    return [f"{key}={str(values).removeprefix('interval(').split(',')[0]}" for key, values in params.items()]


# Of the published worlds sd15 stands for all in the fast tests: a test below makes sure that their files differ in
# values alone.
PUBLISHED = [world for world in WORLDS if world != "marionette"]
RUNS = [
    *((config_of(f"sweep/{name}"), [f"+sweep={name}", *first_values(name)]) for name in SWEEPS),
    *(
        run if world in ("marionette", "sd15") else pytest.param(*run, marks=pytest.mark.slow)
        for world in WORLDS
        for run in (
            *((config_of(f"experiment/{name}"), [f"+experiment={name}", f"world={world}"]) for name in EXPERIMENTS),
            *(("prepare", [f"world={world}", *recipe]) for recipe in RECIPES),
            *((name, [f"world={world}"]) for name in ("sample", "evaluate", "edit")),
        )
    ),
]


def calls(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping with a `_target_` at any depth, with its dotted path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from calls(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from calls(value, f"{path}[{index}]")


def signature_of(target: Any) -> inspect.Signature:
    """The signature of a callable; where a class passes **keywords on to its base, the base's own keywords."""
    signature = inspect.signature(target)
    parameters = dict(signature.parameters)
    for base in inspect.getmro(target)[1:] if inspect.isclass(target) else ():
        rest = [name for name, parameter in parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        if not rest or base is object:
            break
        if "__init__" in vars(base):
            del parameters[rest[0]]
            inherited = list(inspect.signature(base).parameters.items())
            parameters |= {name: parameter for name, parameter in inherited if name not in parameters}
    return signature.replace(parameters=sorted(parameters.values(), key=lambda parameter: parameter.kind))


def misfits(node: Any) -> list[str]:
    """What does not bind to the signature it calls, as "path: target: reason"."""
    found = []
    for path, call in calls(node):
        target = call["_target_"]
        try:
            signature = signature_of(get_object(target))
            given = {name: None for name in GIVEN if name in signature.parameters}
            keys = given | {key: value for key, value in call.items() if key not in INSTRUCTIONS}
            # What a file with defaults leaves out, those say; composed, below, it is all there.
            bind = signature.bind_partial if call.get("_partial_") or "defaults" in node else signature.bind
            bind(*call.get("_args_", ()), **keys)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            found.append(f"{path or '(top)'}: {target}: {error}")
    return found


def compose_plain(config: str, overrides: list[str]) -> dict[str, Any]:
    """Composes a command's config as Hydra does, and resolves every interpolation outside Hydra's own node."""
    importlib.import_module(COMMANDS[config])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(config, overrides, return_hydra_config=True)
    OmegaConf.set_struct(composed, False)
    composed.hydra.job.num, composed.hydra.runtime.output_dir = 0, "outputs"  # what Hydra fills in when it runs
    HydraConfig.instance().set_config(composed)
    del composed["hydra"]
    # An experiment says everything; the other commands may leave values to the command line.
    return OmegaConf.to_container(composed, resolve=True, throw_on_missing=config == "train")


def test_there_are_configs() -> None:
    assert {f"{name}.yaml" for name in COMMANDS} <= set(FILES)
    assert EXPERIMENTS and WORLDS and RECIPES and SWEEPS
    assert any(list(calls(OmegaConf.to_container(OmegaConf.load(CONF / file)))) for file in FILES)


@pytest.mark.parametrize("file", FILES)
def test_comment_on_top_is_a_command(file: str) -> None:
    # Hydra reads `# @package` above every other comment only; further down it is ignored without a word.
    _, *below = (CONF / file).read_text(encoding="utf-8").splitlines()
    assert not [line for line in below if re.match(r"\s*#\s*@package", line)], "expected # @package in the first line"
    module, target = command(file)
    assert module or target, "expected '# python -m ...' or '# make ...' on top (below # @package)"
    if module:
        assert find_spec(module), f"no module {module}"
    else:
        assert target in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M), f"no make target {target}"


@pytest.mark.parametrize("file", FILES)
def test_targets_bind(file: str) -> None:
    assert not misfits(OmegaConf.to_container(OmegaConf.load(CONF / file)))


@pytest.mark.parametrize(
    ("config", "overrides"), RUNS, ids=lambda words: words if isinstance(words, str) else " ".join(words)
)
def test_run_composes_and_the_world_decides_in_one_place(config: str, overrides: list[str]) -> None:
    """A fine-tuned model, its precision and size reach everything that a run makes: labels, latents, images, edits."""
    own = {"path": "my/finetuned", "precision": "bfloat16"}
    words = [f"++world.backbone.{key}={value}" for key, value in own.items()]
    values = compose_plain(config, [*overrides, *words, "world.resolution=96", "world.line_width=3"])
    assert not misfits(values)
    backbones = [call for _, call in calls(values) if "DiffusionBackbone" in call["_target_"]]
    assert len(backbones) == (2 if "data" in values else 1)
    assert all(call == values["world"]["backbone"] and call.items() >= own.items() for call in backbones)
    if "data" in values:
        builder = values["data"]["builder"]
        assert builder["source"]["resolution"] == 96 and builder["annotator"].get("line_width") in (None, 3)
        assert values["data"]["root"] == builder["root"] and values["world"]["name"] in builder["root"]


def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, with its dotted path."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flat(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, node


def test_published_worlds_differ_in_values_alone() -> None:
    shared = OmegaConf.load(CONF / "world/_published.yaml")
    files = {world: OmegaConf.load(CONF / f"world/{world}.yaml") for world in PUBLISHED}
    assert len(files) > 1 and all(list(file.defaults) == ["_published"] for file in files.values())
    values = {world: dict(flat(OmegaConf.to_container(OmegaConf.merge(shared, file)))) for world, file in files.items()}
    first, *others = values.values()
    for other in others:
        assert other.keys() == first.keys()
        assert not [key for key in first if key.endswith("_target_") and other[key] != first[key]]


def test_a_world_is_one_row() -> None:
    for world in WORLDS:
        lines = (CONF / f"world/{world}.yaml").read_text().splitlines()
        own = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
        assert world == "marionette" or len(own) <= 12


def test_misfits_are_found() -> None:
    node = {"a": [{"_target_": "torch.nn.Linear", "in_features": 1, "out_feature": 2}], "b": {"_target_": "torch.no"}}
    assert [line.split(": ")[0] for line in misfits(node)] == ["a[0]", "b"]
    head = {"_target_": "rg.heads.spatial.SpatialHead", "_partial_": True, "projection_dims": 8}  # passes keywords on
    assert "projection_dims" in misfits(head)[0]
    assert not misfits({"_target_": "torch.nn.Linear", "_partial_": True, "in_features": "${width}"})
