"""Trains the embedded model from nothing to the shipped folders: python -m experiments.train_marionette."""

import importlib
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from experiments.marionette.autoencoder import train_autoencoder
from experiments.marionette.export import export
from experiments.marionette.pictures import Pictures, load_pictures
from experiments.marionette.train_denoiser import train_denoiser
from rg.runs import quiet_libraries

STAGES = ("autoencoder", "unet", "detector", "classifier", "card")
# Stages that are commands of their own, by the module and the config of one name.
COMMANDS = {"detector": "train_detector", "classifier": "train_classifier", "card": "marionette_card"}


def load(settings: dict[str, Any], split: str) -> Pictures:
    """The rendered pictures of a split."""
    chosen = settings["pictures"]
    return load_pictures(
        Path(settings["folder"]) / "pictures",
        seed=settings["seed"],
        split=split,
        count=chosen[split],
        workers=chosen["workers"],
    )


def run_autoencoder(settings: dict[str, Any], deadline: float) -> bool:
    """The first stage; returns whether it is done."""
    pictures, held_out = load(settings, "train"), load(settings, "held_out")
    folder = Path(settings["folder"]) / "autoencoder"
    return train_autoencoder(pictures, held_out.image, settings["autoencoder"], folder, deadline)


def run_unet(settings: dict[str, Any], deadline: float) -> bool:
    """The second stage and the shipped pipeline; returns whether it is done."""
    folder = Path(settings["folder"])
    prompts = load(settings, "train").prompt
    if not train_denoiser(prompts, folder / "autoencoder", settings["denoiser"], folder / "unet", deadline):
        return False
    output = Path(settings["export"]) / "marionette"
    print(f"{output}: {export(folder / 'unet' / 'model', output) / 1e6:.1f} MB")
    return True


def run_command(stage: str, settings: dict[str, Any], deadline: float) -> bool:
    """A stage that is a command of its own, on what is exported, with overrides of its config; it has no deadline."""
    module = importlib.import_module(f"experiments.{COMMANDS[stage]}")
    config = OmegaConf.to_container(compose(COMMANDS[stage], settings["commands"][stage]), resolve=True)
    module.run(config)
    return True


def run(settings: dict[str, Any]) -> bool:
    """Runs the asked-for stages in order, each from where it was left; settings as of conf/train_marionette.yaml.

    Returns whether all is done; with max_minutes it may not be: the same call continues.

    Raises:
        ValueError: no such stage.
    """
    if settings["stage"] not in ("all", *STAGES):
        raise ValueError(f"expected stage={'|'.join(('all', *STAGES))}, got {settings['stage']!r}")
    quiet_libraries()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    minutes = settings["max_minutes"]
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    own = {"autoencoder": run_autoencoder, "unet": run_unet}
    for stage in STAGES if settings["stage"] == "all" else (settings["stage"],):
        start = time.monotonic()
        done = own[stage](settings, deadline) if stage in own else run_command(stage, settings, deadline)
        print(f"{stage}: {'done' if done else 'not done yet'} after {(time.monotonic() - start) / 60:.1f} minutes")
        if not done or time.monotonic() > deadline:
            print("the same command continues")
            return False
    return True


@hydra.main(config_path="../conf", config_name="train_marionette", version_base="1.3")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line."""
    run(OmegaConf.to_container(config, resolve=True))


if __name__ == "__main__":
    main()
