"""Trains the embedded model from nothing to the shipped folders: python -m experiments.train_marionette."""

import importlib
import shlex
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.marionette.autoencoder import train_autoencoder
from experiments.marionette.export import export
from experiments.marionette.files import Outcome, fingerprint, is_done, read_settings, write_note
from experiments.marionette.pictures import Pictures, load_pictures, world_id
from experiments.marionette.record import NOTES, write_record
from experiments.marionette.train_denoiser import train_denoiser
from rg.models import locate
from rg.runs import clear_errors, quiet_libraries

CONF = Path(__file__).parents[1] / "conf"
MODULE = "experiments.train_marionette"
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


def run_autoencoder(settings: dict[str, Any], deadline: float) -> Outcome:
    """The first stage."""
    pictures, held_out = load(settings, "train"), load(settings, "held_out")
    folder = Path(settings["folder"]) / "autoencoder"
    return train_autoencoder(pictures, held_out.image, settings["autoencoder"], folder, deadline)


def run_unet(settings: dict[str, Any], deadline: float) -> Outcome:
    """The second stage and the shipped pipeline.

    Raises:
        ValueError: the autoencoder is not done, or its latents are those of other pictures.
    """
    folder, output = Path(settings["folder"]), Path(settings["export"]) / "marionette"
    pictures = load(settings, "train")
    encoded = (read_settings(folder / "autoencoder" / NOTES["autoencoder"]) or {}).get("pictures")
    if encoded != pictures.name:
        raise ValueError(f"expected latents of pictures {pictures.name}, got {encoded}: run stage=autoencoder first")
    outcome = train_denoiser(pictures.prompt, folder / "autoencoder", settings["denoiser"], folder / "unet", deadline)
    if outcome != "not done yet":
        print(f"{output}: {export(folder / 'unet' / 'model', output) / 1e6:.1f} MB")
    return outcome


def run_command(stage: str, settings: dict[str, Any]) -> Outcome:
    """A stage that is a command of its own, on what is exported, with overrides of its config; it has no deadline.

    A judge that is done is left alone with stage=all; asked for by its name it is measured again.
    """
    name, overrides = COMMANDS[stage], settings["commands"][stage]
    module = importlib.import_module(f"experiments.{name}")
    config = OmegaConf.to_container(compose(name, overrides), resolve=True)
    if stage == "card":
        module.run(config, shlex.join(["python", "-m", f"experiments.{name}", *overrides]))
        return "done"
    autoencoder = fingerprint(locate(config["backbone"]) / "vae")
    identity = config | {"autoencoder": autoencoder, "world": world_id(config["seed"])}
    note = Path(settings["folder"]) / stage / NOTES[stage]
    if settings["stage"] == "all" and is_done(note, identity):
        return "done before"
    note.unlink(missing_ok=True)
    module.run(config)
    write_note(note, identity, {})
    return "done"


def run(settings: dict[str, Any], command: str) -> bool:
    """Runs the asked-for stages in order, each from where it was left; folder/record.json says what they took.

    Args:
        settings: as of conf/train_marionette.yaml.
        command: what the record calls this run.

    Returns:
        Whether all is done; with max_minutes it may not be: the same call continues.

    Raises:
        ValueError: no such stage, or one before it is missing.
    """
    if settings["stage"] not in ("all", *STAGES):
        raise ValueError(f"expected stage={'|'.join(('all', *STAGES))}, got {settings['stage']!r}")
    quiet_libraries()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    minutes = settings["max_minutes"]
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes
    own = {"autoencoder": run_autoencoder, "unet": run_unet}
    outcome: Outcome = "done before"
    for stage in STAGES if settings["stage"] == "all" else (settings["stage"],):
        # Every call works on something, even one whose time is over when all is loaded.
        if outcome == "done" and time.monotonic() > deadline:
            outcome = "not done yet"
        if outcome == "not done yet":
            break
        write_record(Path(settings["folder"]), command)  # the card reads it
        start = time.monotonic()
        outcome = own[stage](settings, deadline) if stage in own else run_command(stage, settings)
        print(f"{stage}: {outcome}, after {(time.monotonic() - start) / 60:.1f} minutes")
    write_record(Path(settings["folder"]), command)
    if outcome == "not done yet":
        print("the same command continues")
    return outcome != "not done yet"


@hydra.main(config_path=str(CONF), config_name="train_marionette", version_base="1.3")
@clear_errors
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line."""
    words = [word for word in HydraConfig.get().overrides.task if word.split("=")[0] not in ("stage", "max_minutes")]
    run(OmegaConf.to_container(config, resolve=True), shlex.join(["python", "-m", MODULE, *words]))


if __name__ == "__main__":
    main()
