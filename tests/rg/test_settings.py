"""Every setting has a type, and a wrong one is named before any work."""

import copy
import functools
import re
import time
from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rg.cli import CONF, added_names, compose_config, removed_names
from rg.settings import check, check_arguments, signature_of, type_of

COMMANDS = sorted(
    found[1]
    for package in ("rg", "data_prep", "experiments")
    for path in (CONF.parent / package).rglob("*.py")
    if (found := re.search(r'^@command\("([\w/]+)"', path.read_text(), re.MULTILINE))
)


composed = functools.cache(lambda config: compose_config(config, []))


def plain(node: Any, path: str = "") -> Iterator[str]:
    """Dotted names of all settings outside of constructor calls."""
    if not isinstance(node, dict) or type_of(path) not in (None, type_of("backbone")):
        yield path
    elif "_target_" not in node:
        for key, value in node.items():
            yield from plain(value, f"{path}.{key}".lstrip("."))


@pytest.mark.parametrize("config", COMMANDS)
def test_every_setting_of_a_command_has_a_type_that_its_own_value_fits(config):
    cfg = composed(config)
    check(cfg)
    settings = OmegaConf.to_container(cfg, resolve=False)
    assert cfg.verbose is False
    holders = ("data", "trainer", "logger", "logger.wandb", "logger.csv")  # constructor calls, or choices of them
    assert not [name for name in plain(settings) if type_of(name) is None and name not in holders]


@pytest.mark.parametrize("experiment", sorted(path.stem for path in CONF.glob("experiment/*.yaml")))
def test_experiments_fit(experiment):
    text = (CONF / f"experiment/{experiment}.yaml").read_text()
    config = re.search(r"python -m rg\.(\w+)", text)[1]
    check(compose_config(config, [f"+experiment={experiment}", "world=sdxl"]))


@pytest.mark.parametrize(
    ("config", "word", "named"),
    [
        ("train", "trainer.max_steps=x", ["trainer.max_steps", "integer", '"x"']),
        ("train", "trainer.max_steps=null", ["trainer.max_steps", "integer", "null"]),
        ("train", "trainer.max_steps=-3", ["trainer.max_steps", "1", "-3"]),
        ("train", "data.batch_size=0", ["data.batch_size", "1", "0"]),
        ("train", "data.batch_size=true", ["data.batch_size", "integer", "true"]),
        ("train", "data.size=1.5", ["data.size", "integer", "1.5"]),
        ("train", "head.control_range=[0]", ["head.control_range", "[0]"]),
        ("train", "head.val_timesteps=[]", ["head.val_timesteps", "1", "[]"]),
        ("train", "head.sparse=3", ["head.sparse", "boolean", "3"]),
        ("train", "+head.tapss=[1]", ["head.tapss", "taps"]),
        ("train", "data.builder.source.kinds={one: x}", ["data.builder.source.kinds", "number", '"x"']),
        ("train", "head._target_=rg.heads.None", ["head._target_", "rg.heads.None"]),
        ("train", "logger.csv.save_dir={a: 1}", ["logger.csv.save_dir", '{"a": 1}']),
        ("sample", "guidance.readout_scale={a: 1}", ["guidance.readout_scale", "number", '{"a": 1}']),
        ("sample", "guidance.readout_scale=nan", ["guidance.readout_scale", "finite", "NaN"]),
        ("sample", "guidance.branch=uncnd", ["guidance.branch", "uncond", '"uncnd"']),
        ("sample", "sampling.num_inference_steps=null", ["sampling.num_inference_steps", "integer", "null"]),
        ("sample", "images='4'", ["images", "integer", '"4"']),
        ("sample", "head.path=''", ["head.path", "1", '""']),
        ("sample", "+experiement=pose_control", ["experiement", "experiment"]),
        ("sample", "+head.pth=pose_8k5", ["head.pth", "head.path"]),
        ("evaluate", "batch_size=0", ["batch_size", "1", "0"]),
        ("evaluate", "alphas=[]", ["alphas", "1", "[]"]),
        ("evaluate", "world.judges=[]", ["world.judges", "1", "[]"]),
        ("evaluate", "allow_same_judge=1", ["allow_same_judge", "boolean", "1"]),
        ("evaluate", "world.detectors.transformer.foldr=a", ["foldr", "folder"]),
        ("evaluate", "split=tset", ["split", "test", '"tset"']),
        ("edit", "drag=[[1,2,3]]", ["drag", "4", "[[1, 2, 3]]"]),
        ("edit", "noise=old", ["noise", "reference", '"old"']),
        ("prepare", "data.builder.annotator.line_width=x", ["data.builder.annotator.line_width", "number", '"x"']),
        ("prepare", "n=-1", ["n", "1", "-1"]),
        ("experiments/benchmark", "repeats=none", ["repeats", "integer", '"none"']),
        ("cost", "hardware.gflops=-1", ["hardware.gflops", "0", "-1"]),
        ("train", "verbose=1", ["verbose", "boolean", "1"]),
        ("experiments/rules", "+rules.mine={strengts:[0.5]}", ["rules.mine.strengts", "rules.mpgd.strengths"]),
        ("edit", "world.backbone='0'", ["world.backbone", "_target_", '"0"']),
        ("train", "world.projection_dim={_target_: os.getcwd}", ["world.projection_dim", "plain", "os.getcwd"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected_and_found(config, word, named):
    cfg = copy.deepcopy(composed(config))
    override = OverridesParser.create().parse_override(word)
    OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False, force_add=True)
    with pytest.raises(ValueError) as caught:
        check(cfg, added_names([word]))
    message = str(caught.value)
    assert not [part for part in named if part not in message] and "\n" not in message, message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("sample", ["guidance=freedom", "guidance.update.rho=2", "guidance.repeats.times=3"]),
        ("sample", ["guidance.repeats=null", "guidance.enough=0.5"]),
        ("sample", ["guidance.readout_scale=3", "sampling.guidance_scale=2", "+sampling.negative_prompt=[a,b]"]),
        (
            "evaluate",
            [
                "+world.detectors.own={_target_:rg.detectors.PoseTransformer.from_pretrained,folder:a}",
                "world.judges=[own]",
            ],
        ),
        ("sample", ["head.released=pose", "control=a.png", "+sampling.height=96", "guidance=released"]),
        ("train", ["data.size=null", "data.val_size=null", "head.control_range=[-1,1]", "+trainer.precision=bf16"]),
        ("train", ["~logger.wandb", "+head.taps=[0,1]", "+trainer.enable_progress_bar=false", "pictures=folder"]),
        ("edit", ["drag=[[1,2,3.5,4]]", "guidance.normalize=null", "terms=[appearance]"]),
        ("evaluate", ["resume=true", "verbose=true"]),
        ("experiments/marionette_train", ["preset=day"]),
        ("experiments/marionette_train", ["preset=gpu"]),
        ("cost", ["job=sample", "+experiment=pose_control", "world=sd15"]),
        ("experiments/rules", ["+rules.mine={overrides:['guidance=pose'],strengths:[0.5]}"]),
    ],
)
def test_what_can_be_passes(config, words):
    check(compose_config(config, words), added_names(words), removed_names(words))


def test_what_a_call_needs_is_not_taken_away():
    words = ["~data.builder.encode_batch", "~data.builder.source"]
    with pytest.raises(ValueError, match=r"^~data\.builder\._recursive_: expected"):
        check(compose_config("train", ["~data.builder._recursive_"]), (), ["data.builder._recursive_"])
    with pytest.raises(ValueError, match=r"^~data\.builder\.source: .*data_prep\.prepare\.build"):
        check(compose_config("train", ["pictures=folder", *words]), (), removed_names(words))


def test_arguments_that_are_passed_on_belong_to_who_takes_them():
    head = signature_of(resolve_name("rg.heads.SpatialHead"))
    assert {"variant", "projection_dim", "val_timesteps"} <= set(head.arguments) and not head.takes_more
    preset = signature_of(resolve_name("rg.guidance.ReadoutGuidance.preset"))
    assert {"name", "terms", "readout_scale"} <= set(preset.arguments) and not preset.takes_more
    with pytest.raises(ValueError, match="sampling.*negative_promt.*negative_prompt"):
        pipeline = resolve_name("diffusers.StableDiffusionPipeline")
        check_arguments(pipeline.__call__, {"negative_promt": "x"}, "sampling", closed=True)


def test_checking_is_cheap_once_all_is_imported():
    cfg = compose_config("train", ["+experiment=pose_100"])
    check(cfg)
    begin = time.process_time()
    check(cfg)
    assert time.process_time() - begin < 0.2
