"""Trains the embedded model from nothing to the shipped folders: python -m experiments.marionette.train."""

import importlib
import json
import shlex
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from data_prep.marionette.render import render
from experiments.marionette.autoencoder import train_autoencoder
from experiments.marionette.denoiser import load_average, train_denoiser
from experiments.marionette.record import NOTES, Outcome, is_done, read_settings, write_note, write_record
from experiments.marionette.renders import Renders, load_renders, world_id
from rg.cli import command, quiet_libraries
from rg.io.files import fingerprint
from rg.models import locate

MODULE = "experiments.marionette.train"
LARGEST_FILE = "15MB"
STAGES = ("autoencoder", "unet", "detector", "transformer", "classifier", "card")
# Stages that are commands of their own, by the module and the config of one name.
COMMANDS = {
    "detector": ("experiments.marionette.judges.detector", "experiments/marionette_detector"),
    "transformer": ("experiments.marionette.judges.transformer", "experiments/marionette_transformer"),
    "classifier": ("experiments.marionette.judges.classifier", "experiments/marionette_classifier"),
    "card": ("experiments.marionette.card.measure", "experiments/marionette_card"),
}


def export(trained: Path, output: Path) -> int:
    """Writes the pipeline in the folder `trained` to `output` in half precision, returns its size in bytes.

    What was in `output` is replaced at the very end; a README.md there is kept.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(trained, dtype=torch.float16, local_files_only=True)
    partial, former = (output.with_name(output.name + ending) for ending in (".partial", ".former"))
    if former.is_dir() and not output.is_dir():  # an earlier call was stopped between the two renamings below
        former.replace(output)
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, max_shard_size=LARGEST_FILE)
    for path in partial.rglob("*.json"):  # _name_or_path is a local path of this machine: not to be published
        text = json.loads(path.read_text(encoding="utf-8"))
        text.pop("_name_or_path", None)
        path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    if (output / "README.md").is_file():
        shutil.copy(output / "README.md", partial)
    shutil.rmtree(former, ignore_errors=True)
    if output.is_dir():
        output.replace(former)
    partial.replace(output)
    shutil.rmtree(former, ignore_errors=True)
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


def load(settings: dict[str, Any], split: str) -> Renders:
    """The rendered images of a split."""
    chosen = settings["pictures"]
    return load_renders(
        Path(settings["folder"]) / "pictures",
        seed=settings["seed"],
        split=split,
        count=chosen[split],
        workers=chosen["workers"],
        renderer=partial(render, sided=chosen["sided"]),
    )


def run_autoencoder(settings: dict[str, Any], deadline: float) -> Outcome:
    """The first stage."""
    images, held_out = load(settings, "train"), load(settings, "held_out")
    folder = Path(settings["folder"]) / "autoencoder"
    return train_autoencoder(images, held_out.image, settings["autoencoder"], folder, deadline)


def run_unet(settings: dict[str, Any], deadline: float) -> Outcome:
    """The second stage and the shipped pipeline.

    Raises:
        ValueError: the autoencoder is not done, or its latents are those of other images.
    """
    folder, output = Path(settings["folder"]), Path(settings["export"]) / "marionette"
    prompts, name = load(settings, "train")[1:]
    encoded = (read_settings(folder / "autoencoder" / NOTES["autoencoder"]) or {}).get("pictures")
    if encoded != name:
        raise ValueError(f"expected latents of images {name}, got {encoded}: run stage=autoencoder first")
    outcome = train_denoiser(prompts, folder / "autoencoder", settings["denoiser"], folder / "unet", deadline)
    if outcome != "not done yet":
        print(f"{output}: {export(folder / 'unet' / 'model', output) / 1e6:.1f} MB")
    return outcome


def run_export(settings: dict[str, Any]) -> None:
    """Exports what the U-Net's training has learnt so far, or the mean of several of its checkpoints.

    It only reads the training's folder: the training may go on meanwhile.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: no checkpoint is named, or they do not belong together or to the folder's autoencoder.
    """
    folder, output = Path(settings["folder"]), Path(settings["export"]) / "marionette"
    if not settings["checkpoints"]:
        raise ValueError(f"expected checkpoints=[name,...] in {folder / 'unet'}, got {settings['checkpoints']}")
    chosen = [folder / "unet" / name for name in settings["checkpoints"]]
    pipeline, steps = load_average(chosen, folder / "autoencoder" / "model")
    with tempfile.TemporaryDirectory() as trained:
        pipeline.save_pretrained(trained)
        print(f"{output}: {export(Path(trained), output) / 1e6:.1f} MB, after {', '.join(map(str, steps))} steps")


def run_command(stage: str, settings: dict[str, Any]) -> Outcome:
    """A stage that is a command of its own, on what is exported, with overrides of its config; it has no deadline.

    A judge that is done is left alone with stage=all; asked for by its name it is measured again.
    """
    (path, name), overrides = COMMANDS[stage], settings["commands"][stage]
    module = importlib.import_module(path)
    config = OmegaConf.to_container(compose(name, overrides), resolve=True)
    if stage == "card":
        module.run(config, shlex.join(["python", "-m", path, *overrides]))
        return "done"
    autoencoder = fingerprint(locate(config["backbone"]) / "vae")
    own = {key: value for key, value in config.items() if key != "verbose"}
    identity = own | {"autoencoder": autoencoder, "world": world_id(config["seed"])}
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
        settings: as of conf/experiments/marionette_train.yaml.
        command: what the record calls this run.

    Returns:
        Whether all is done; with max_minutes it may not be: the same call continues.

    Raises:
        ValueError: no such stage, or one before it is missing.
    """
    if settings["stage"] not in ("all", *STAGES, "export"):
        raise ValueError(f"expected stage={'|'.join(('all', *STAGES, 'export'))}, got {settings['stage']!r}")
    quiet_libraries()
    if settings["stage"] == "export":
        run_export(settings)
        return True
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


@command("experiments/marionette_train")
def main(config: DictConfig) -> None:
    """Runs the training with the configuration of the command line."""
    words = [word for word in HydraConfig.get().overrides.task if word.split("=")[0] not in ("stage", "max_minutes")]
    run(OmegaConf.to_container(config, resolve=True), shlex.join(["python", "-m", MODULE, *words]))


if __name__ == "__main__":
    main()
