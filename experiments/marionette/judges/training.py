"""The training that the judges share: from labelled images to a network, and the parts of a model card."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Generator, Tensor

from experiments.marionette.judges.data import Renders, load_training_renders
from experiments.marionette.renders import world_id
from experiments.marionette.trainer import Trainer
from rg.backbone.diffusion import DiffusionBackbone
from rg.detectors.stored import StoredNetwork
from rg.io.files import write_text

Judge = TypeVar("Judge", bound=StoredNetwork)
# How a network is trained; what is not named here or by the settings of a judge does not decide its weights.
RECIPE = {"warm_up": 100, "decay": 1.0, "weight_decay": 0.01, "ema": 0.998}
PLACES = ("output", "folder", "cache", "verbose", "other")


def train(
    network: Judge,
    loss: Callable[[Judge, Renders, Tensor, Generator], Tensor],
    backbone: DiffusionBackbone,
    settings: Mapping[str, Any],
    deadline: float = math.inf,
) -> Judge:
    """Trains a network, or goes on where the same training was stopped, and returns its average, ready to judge.

    Args:
        loss: of one step on training images and images without a person; all chance comes from the generator.
        settings: as of conf/experiments/marionette_detector.yaml. Other settings, another autoencoder and another world
            train in other folders below settings["folder"].
        deadline: by time.monotonic(); once it has passed, the training stops after the step under way.
    """
    chosen = {key: value for key, value in settings.items() if key not in PLACES} | RECIPE
    chosen |= {"autoencoder": backbone.autoencoder_id, "world": world_id(settings["seed"])}
    name = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    images = None

    def step(network: Judge, generator: Generator) -> Tensor:
        nonlocal images
        if images is None:  # a training that is finished needs none
            images = load_training_renders(backbone, settings)
        # Renders are varied on the CPU wherever the network is.
        return loss(network, *images, Generator().manual_seed(generator.initial_seed()))

    trainer = Trainer(network, step, chosen | {"preview_minutes": math.inf}, Path(settings["folder"]) / name)
    trainer.run(deadline, lambda network, path: None)
    return trainer.average.eval()


def describe(settings: Mapping[str, Any]) -> str:
    """Settings as they are typed."""
    return " ".join(f"{key}={value}".replace(" ", "") for key, value in settings.items() if key not in PLACES)


def write_card(folder: Path, text: str) -> None:
    """Writes README.md into a folder of weights, whole or not at all."""
    write_text(folder / "README.md", text)
