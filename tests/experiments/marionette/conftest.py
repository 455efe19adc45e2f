"""Pictures, a trained autoencoder and a trained pipeline, each the smallest there is, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.marionette.autoencoder import train_autoencoder
from experiments.marionette.denoiser import train_denoiser
from experiments.marionette.renders import Pictures, load_pictures


@pytest.fixture(scope="session")
def settings(training: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """8 pictures."""
    return load_pictures(tmp_path_factory.mktemp("pictures"), seed=1, split="train", count=8, workers=1)


@pytest.fixture(scope="session")
def autoencoder(pictures: Pictures, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an autoencoder after 3 steps on the pictures."""
    folder = tmp_path_factory.mktemp("autoencoder")
    assert train_autoencoder(pictures, pictures.image[:4], settings["autoencoder"], folder, float("inf")) == "done"
    return folder


@pytest.fixture(scope="session")
def trained(
    pictures: Pictures, autoencoder: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a denoiser after 3 steps on the latents of the autoencoder."""
    folder = tmp_path_factory.mktemp("denoiser")
    assert train_denoiser(pictures.prompt, autoencoder, settings["denoiser"], folder, float("inf")) == "done"
    return folder
