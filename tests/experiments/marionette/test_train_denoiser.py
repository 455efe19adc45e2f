import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from diffusers import StableDiffusionPipeline

from data_prep.marionette.scene_sampling import draw_scene
from experiments.marionette.denoiser import train_denoiser
from experiments.marionette.renders import Renders


def weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def test_pieces_are_one_run_and_end_in_a_pipeline(
    images: Renders, settings: dict[str, Any], autoencoder: Path, trained: Path, tmp_path: Path
) -> None:
    arguments = (images.prompt, autoencoder, settings["denoiser"], tmp_path, 0.0)
    assert [train_denoiser(*arguments) for _ in range(4)] == ["not done yet"] * 2 + ["done", "done before"]
    assert (tmp_path / "losses.csv").read_bytes() == (trained / "losses.csv").read_bytes()
    assert weights(tmp_path / "model") == weights(trained / "model") and len(weights(tmp_path)) == 3
    for folder in (tmp_path, trained):
        assert cv2.imread(str(folder / "000003.png")).shape == (2 * 128, 4 * 128, 3)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.vae.dtype == torch.float32 and pipeline.tokenizer.model_max_length == 48
    assert pipeline.vae.config.scaling_factor != 0.18215


def test_a_seed_decides_and_another_autoencoder_is_refused(
    images: Renders, settings: dict[str, Any], autoencoder: Path, trained: Path, tmp_path: Path
) -> None:
    other = settings["denoiser"] | {"seed": 2}
    train_denoiser(images.prompt, autoencoder, other, tmp_path / "unet", 0.0)
    first = (trained / "losses.csv").read_text().splitlines()[1]
    assert (tmp_path / "unet/losses.csv").read_text().splitlines()[1] != first
    shutil.copytree(autoencoder, tmp_path / "autoencoder")
    config = tmp_path / "autoencoder/model/config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"autoencoder=\w{16}.* autoencoder=\w{16}"):
        train_denoiser(images.prompt, tmp_path / "autoencoder", other, tmp_path / "unet", 0.0)


def test_the_tokenizer_of_a_sided_training_knows_its_words(
    settings: dict[str, Any], autoencoder: Path, tmp_path: Path
) -> None:
    prompts = [draw_scene((3, 0, index), sided=True).prompt for index in range(8)]
    sided = settings["denoiser"] | {"sided": True, "tokens": 72, "steps": 1}
    assert train_denoiser(prompts, autoencoder, sided, tmp_path, float("inf")) == "done"
    tokenizer = StableDiffusionPipeline.from_pretrained(tmp_path / "model").tokenizer
    assert tokenizer.model_max_length == 72
    assert all(len(tokenizer(prompt).input_ids) == 2 + len(prompt.split()) for prompt in prompts)
