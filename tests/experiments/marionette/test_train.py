import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from data_prep.marionette.render import render
from data_prep.marionette.vocabulary import ATTRIBUTES
from experiments.marionette.autoencoder import make_autoencoder
from experiments.marionette.denoiser import Denoiser, know_words, make_pipeline
from experiments.marionette.train import STAGES, export, load, main, run
from rg.backbone.diffusion import DiffusionBackbone
from rg.detectors.attributes import AttributeClassifier
from rg.detectors.keypoints import KeypointDetector
from rg.detectors.transformer import PoseTransformer

JUDGE = ["images=8", "held_out=3", "steps=1", "batch_size=8", "widths=[8,8,8]"]
CARD = [
    *("images=4", "unseen=2", "changed=1", "batch_size=4", "parts=2", "sheet_images=4"),
    *("sampling.num_inference_steps=2", "latency={images:2,num_inference_steps:1,repeats:1}"),
]


def with_tiny_commands(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    settings["commands"]["detector"] += [*JUDGE, "finder_widths=[8,8,8]"]
    settings["commands"]["transformer"] += [*JUDGE, "encoder_layers=1", "decoder_layers=1"]
    settings["commands"]["classifier"] += JUDGE
    settings["commands"]["card"] += [*CARD, f"results={folder}/results.json", f"sheet={folder}/sheet.png"]
    return settings


@pytest.mark.slow
def test_calls_without_time_get_through_all_stages(
    training: Callable[..., dict[str, Any]], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["max_minutes=0", "autoencoder.steps=2", "denoiser.steps=2"]
    settings = with_tiny_commands(training(tmp_path, *words), tmp_path)
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        assert [run(settings, "python -m x") for _ in range(8)] == [False] * 7 + [True]
    printed = capsys.readouterr().out
    for stage, calls in zip(STAGES, (2, 2, 1, 1, 1, 1), strict=True):
        assert printed.count(f"{stage}: done, ") == 1 and printed.count(f"{stage}: not done yet, ") == calls - 1

    record = json.loads((tmp_path / "work/record.json").read_text())
    assert record.pop("command") == "python -m x" and set(record) == {"pictures", *STAGES[:-1]}
    assert all(found["seconds"] > 0 for found in record.values())
    assert [record[stage]["steps"] for stage in STAGES[:-1]] == [2, 2, 1, 1, 1]
    assert record["autoencoder"]["quality"]["psnr_mean"] > 0
    assert record["unet"]["settings"]["steps"] == 2 and record["detector"]["batch_size"] == 8

    made = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert made == ["classifier", "detector", "marionette", "transformer"]
    card = (tmp_path / "models/marionette/README.md").read_text()
    assert f"python -m experiments.marionette.card.measure model={tmp_path}/models/marionette" in card.replace(
        "\n", " "
    )
    assert "| unet | 2 | 4 |" in card
    assert DiffusionBackbone.from_pretrained(str(tmp_path / "models/marionette")).resolution == (64, 64)


def test_the_command_goes_on_and_says_what_to_do(
    training: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["preset=cpu", f"folder={tmp_path}/work", f"export={tmp_path}/models", "autoencoder.widths=[8,8]"]
    words += ["pictures={train:8,held_out:4,workers:1,sided:false}", "autoencoder.steps=2", "autoencoder.batch_size=2"]
    for more in (["stage=autoencoder", "max_minutes=0"], ["stage=autoencoder"]):
        monkeypatch.setattr(sys, "argv", ["train_marionette", *words, *more])
        main()
    record = json.loads((tmp_path / "work/record.json").read_text())
    assert record["command"].startswith(f"python -m experiments.marionette.train preset=cpu folder={tmp_path}/work ")
    assert "stage" not in record["command"] and record["autoencoder"]["steps"] == 2
    monkeypatch.setattr(sys, "argv", ["train_marionette", *words, "stage=autoencoder", "autoencoder.learning_rate=1"])
    with pytest.raises(SystemExit, match=r"learning_rate=0.002.* learning_rate=1\b"):
        main()


def test_stages_come_in_their_order(training: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage=all\|autoencoder\|.*'vae'"):
        run(training(tmp_path, "stage=vae"), "")
    with pytest.raises(ValueError, match=r"images \w+-7001-train-8.* None.*stage=autoencoder"):
        run(training(tmp_path, "stage=unet"), "")
    assert run(training(tmp_path, "stage=autoencoder"), "")
    with pytest.raises(ValueError, match=r"-7001-train-7.*-7001-train-8.*stage=autoencoder"):
        run(training(tmp_path, "stage=unet", "pictures.train=7"), "")


@pytest.mark.parametrize("preset", ["cpu", "gpu", "day"])
def test_what_a_preset_ships_is_small(root: Path, tmp_path: Path, preset: str) -> None:
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        composed = compose("experiments/marionette_train", [f"preset={preset}"])
        judges = [compose(f"experiments/marionette_{name}") for name in ("detector", "transformer", "classifier")]
    settings = OmegaConf.to_container(composed, resolve=True)
    make_autoencoder(settings["autoencoder"]["widths"], 64, seed=0).save_pretrained(tmp_path / "vae")
    tokenizer, _ = know_words(settings["denoiser"])
    denoiser = Denoiser(settings["denoiser"]["unet"], settings["denoiser"]["text"], tokenizer, 16)
    make_pipeline(denoiser, tokenizer, tmp_path / "vae").save_pretrained(tmp_path / "trained")
    detector, transformer, classifier = judges
    sizes = {"widths": detector.widths, "finder_widths": detector.finder_widths}
    KeypointDetector(**sizes, threshold=0.5).save_pretrained(tmp_path / "models/detector")
    sizes = {name: transformer[name] for name in ("widths", "encoder_layers", "decoder_layers", "people")}
    PoseTransformer(**sizes, threshold=0.5).save_pretrained(tmp_path / "models/transformer")
    AttributeClassifier(attributes=ATTRIBUTES, widths=classifier.widths).save_pretrained(tmp_path / "models/classifier")
    export(tmp_path / "trained", tmp_path / "models/marionette")

    sizes = [path.stat().st_size for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert max(sizes) < 16e6 and sum(sizes) < 40e6
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "models/marionette", dtype=torch.float16)
    weights = loaded.unet.state_dict()
    assert all(torch.equal(weights[name], weight.half()) for name, weight in denoiser.unet.state_dict().items())


def test_a_sided_training_renders_sided_scenes(training: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    plain, sided = (
        load(training(tmp_path, f"pictures.sided={words}", "pictures.train=5"), "train") for words in ("false", "true")
    )
    expected = render([(7001, 0, index) for index in range(5)], sided=True)
    assert torch.equal(sided.image, expected.image) and sided.prompt == expected.prompt
    assert sided.name != plain.name and not any("facing" in prompt for prompt in plain.prompt)
