"""The five commands at tiny size, run whole, with one override of theirs that is anything."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from rg.cli import compose_config
from rg.heads.appearance import AppearanceHead
from rg.heads.spatial import SpatialHead
from tests.campaign import watch
from tests.campaign.kinds import make_folders, make_pipeline
from tests.campaign.mutate import change_words

SECONDS = 60.0
LEGAL = 12.0  # seconds after which a command that has begun its work, and was not refused, is left alone

WORLD = ["world.backbone.path=model", "world.resolution=32", "world.projection_dim=16", "world.norm_groups=2"]
IMAGES = ["pictures=folder", "pictures.path=images", "pictures.labels=labels"]
SHARES = ["pictures.validation_share=0.3", "pictures.test_share=0.3", "pictures.seed=4"]  # 2, 1 and 1 of 4 images
STEPS = ["sampling.num_inference_steps=2", "images=1"]
COMMANDS = {
    "rg.sample": ["+experiment=pose_control", "head.path=head", "control=control.json", *WORLD, *STEPS],
    "rg.evaluate": ["head.path=head", *WORLD, *IMAGES, *SHARES, *STEPS],
    "rg.edit": ["+experiment=variation", "terms=[appearance]", *WORLD, *STEPS],
    "rg.train": [
        *("data=pose", *WORLD, *IMAGES, *SHARES, "world.hidden_channels=8", "data.size=2", "data.val_size=1"),
        *("data.batch_size=2", "data.epoch_batches=1", "trainer.max_steps=1", "trainer.accelerator=cpu"),
        *("head.val_timesteps=[50]", "~logger.wandb"),
    ],
    "data_prep.prepare": ["data=pose", *WORLD, *IMAGES, *SHARES],
}


class TookLong(BaseException):
    """Legal work that goes on."""


@dataclass(frozen=True)
class Command:
    """A command and its overrides; cases as tests.campaign.cases has them.

    Attributes:
        module: is run as python -m.
        weight: share of the cases.
    """

    module: str
    weight: float

    def make(self, folder: Path) -> None:
        """Everything that the commands read, below a folder."""
        make_folders(folder)
        (folder / "model").mkdir()
        make_pipeline(folder / "model")
        widths = widths_of(folder / "model")
        small = {"projection_dim": 16, "norm_groups": 2, "output_scale": 2}
        SpatialHead(**widths, **small, hidden_channels=8).save_pretrained(folder / "head")
        AppearanceHead(**widths, projection_dim=16, norm_groups=2).save_pretrained(folder / "appearance")
        shutil.copy(folder / "labels" / "0.json", folder / "control.json")
        text = (folder / "control.json").read_text()
        (folder / "control.json").write_text(text.replace('{"', '{"size": [24, 30], "', 1))

    def case(self, whole: Path, rng: np.random.Generator) -> tuple[str, watch.Outcome]:
        """One override and what the command made of it."""
        words, name = change_words(COMMANDS[self.module], names(self.module), rng)
        word = words[-1]
        if "../" in word or "_target_" in name or "\0" in word or name.endswith("run_dir"):
            words[-1] = word = f"{name.replace('_target_', 'target')}=-3"
        folder = whole.with_name(f"{whole.name}-case")
        shutil.copytree(whole, folder)
        said = [part for part in (*name.split("."), "split", word.partition("=")[2][:20]) if len(part) > 1]
        said += [f"{name}:", *(["data.builder"] if name.startswith("pictures.") else [])]  # which takes these over
        try:
            outcome = watch.run(lambda: run(self.module, words), folder, [word, *said], None, SECONDS)
        finally:
            shutil.rmtree(folder)
        return word[:200], outcome


@cache
def names(module: str) -> list[str]:
    """Dotted names of a command's settings."""
    words = [word for word in COMMANDS[module] if not word.startswith("~")]
    return sorted(flat(OmegaConf.to_container(compose_config(module.split(".")[-1], words), resolve=False)))


def widths_of(model: Path) -> dict[str, Any]:
    """What heads must know of a pipeline."""
    from rg.backbone.diffusion import DiffusionBackbone

    backbone = DiffusionBackbone.from_pretrained(str(model))
    return {name: getattr(backbone, name) for name in ("tap_channels", "time_embed_dim", "condition_dim")}


def flat(node: Any, path: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{path}{key}"
        yield from flat(value, f"{path}{key}.")


def run(module: str, words: list[str]) -> str:
    """Runs a command as its module's main does; one that works for LEGAL seconds without an error is accepted."""
    begun: list[bool] = []
    torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: begun.append(True) if not begun else None)

    def stop(*_: Any) -> None:
        if begun:
            raise TookLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, LEGAL, 1.0)
    sys.argv = [module, *words]
    os.environ |= {"WANDB_MODE": "disabled", "HYDRA_FULL_ERROR": "0"}
    GlobalHydra.instance().clear()
    try:
        import_module(module).main()
    except TookLong:
        return "goes on"
    return "done"


SETTINGS = {
    "settings of sample": Command("rg.sample", 1),
    "settings of evaluate": Command("rg.evaluate", 1),
    "settings of edit": Command("rg.edit", 1),
    "settings of train": Command("rg.train", 1),
    "settings of prepare": Command("data_prep.prepare", 1),
}
