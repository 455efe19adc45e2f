"""Renders, a trained autoencoder and a trained pipeline, each the smallest there is, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.marionette.autoencoder import train_autoencoder
from experiments.marionette.denoiser import train_denoiser
from experiments.marionette.renders import Renders, load_renders


@pytest.fixture(scope="session")
def settings(training: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return training(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Renders:
    """8 images."""
    return load_renders(tmp_path_factory.mktemp("pictures"), seed=1, split="train", count=8, workers=1)


@pytest.fixture(scope="session")
def autoencoder(images: Renders, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an autoencoder after 3 steps on the images."""
    folder = tmp_path_factory.mktemp("autoencoder")
    assert train_autoencoder(images, images.image[:4], settings["autoencoder"], folder, float("inf")) == "done"
    return folder


@pytest.fixture(scope="session")
def trained(
    images: Renders, autoencoder: Path, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a denoiser after 3 steps on the latents of the autoencoder."""
    folder = tmp_path_factory.mktemp("denoiser")
    assert train_denoiser(images.prompt, autoencoder, settings["denoiser"], folder, float("inf")) == "done"
    return folder
