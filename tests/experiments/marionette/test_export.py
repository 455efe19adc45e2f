import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from experiments.marionette.denoiser import train_denoiser
from experiments.marionette.renders import Renders
from experiments.marionette.train import export, run


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_shipped_is_half_and_samples(trained: Path, tmp_path: Path) -> None:
    size = export(trained / "model", tmp_path / "marionette")
    assert size == sum((tmp_path / "marionette" / name).stat().st_size for name in names(tmp_path / "marionette"))
    assert not any("_name_or_path" in path.read_text() for path in tmp_path.rglob("*.json"))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "marionette", dtype=torch.float16)
    parts = {"unet", "vae", "text_encoder"}
    assert all(getattr(pipeline, part).dtype == torch.float16 for part in parts)
    assert {name.split("/")[0] for name in names(tmp_path / "marionette") if name.endswith(".safetensors")} == parts
    whole = StableDiffusionPipeline.from_pretrained(trained / "model")
    for part in parts:
        half = getattr(pipeline, part).state_dict()
        assert all(torch.equal(half[name], tensor.half()) for name, tensor in getattr(whole, part).state_dict().items())
    made = pipeline.to(dtype=torch.float32)("a person in a red shirt", num_inference_steps=2, output_type="np").images
    assert made.shape == (1, 64, 64, 3) and made.std() > 0


def test_the_old_folder_is_replaced_as_a_whole_and_its_card_kept(trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "marionette"
    (output / "unet").mkdir(parents=True)
    (output / "unet/old.safetensors").touch()
    (output / "README.md").write_text("card")
    export(trained / "model", output)
    assert "unet/old.safetensors" not in names(output) and (output / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["marionette"]
    # An earlier call was stopped in the very moment between taking the old folder away and putting the new one there.
    output.rename(tmp_path / "marionette.former")
    export(trained / "model", output)
    assert (output / "README.md").read_text() == "card"
    assert [path.name for path in tmp_path.iterdir()] == ["marionette"]


def test_an_export_that_is_killed_leaves_the_old_folder(
    trained: Path, tmp_path: Path, kill_when: Callable[..., None]
) -> None:
    output = tmp_path / "marionette"
    export(trained / "model", output)
    before = {name: (output / name).read_bytes() for name in names(output)}

    kill_when((tmp_path / "marionette.partial").is_dir, export, trained / "model", output)
    assert {name: (output / name).read_bytes() for name in names(output)} == before
    export(trained / "model", output)
    assert json.loads((output / "unet/config.json").read_text())["in_channels"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["marionette"]


@pytest.mark.slow
def test_a_training_under_way_is_exported_and_left_alone(
    images: Renders, settings: dict[str, Any], autoencoder: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(autoencoder, work / "autoencoder")
    arguments = (images.prompt, work / "autoencoder", settings["denoiser"], work / "unet", 0.0)
    assert train_denoiser(*arguments) == "not done yet"
    shutil.copy(work / "unet/checkpoint.pt", work / "unet/hour-001.pt")
    assert train_denoiser(*arguments) == "not done yet"
    before = {name: (work / name).read_bytes() for name in names(work)}
    unet = {}
    for chosen in (["checkpoint.pt"], ["hour-001.pt", "checkpoint.pt"]):
        output = tmp_path / "-".join(chosen)
        places = {"stage": "export", "folder": str(work), "export": str(output), "checkpoints": chosen}
        assert run(settings | places, "")
        pipeline = StableDiffusionPipeline.from_pretrained(output / "marionette", dtype=torch.float16)
        assert pipeline.unet.config.sample_size == 16 and pipeline.tokenizer.model_max_length == 48
        states = [torch.load(work / "unet" / name, weights_only=True)["average"] for name in chosen]
        unet[len(unet)] = pipeline.unet.state_dict()
        for part in ("unet", "text_encoder"):
            for name, weight in getattr(pipeline, part).state_dict().items():
                mean = sum(state[f"{part}.{name}"].double() for state in states) / len(states)
                assert torch.equal(weight, mean.float().half()), name
    assert any(not torch.equal(unet[0][name], unet[1][name]) for name in unet[0])
    assert {name: (work / name).read_bytes() for name in names(work)} == before


def test_an_export_of_what_does_not_belong_together_is_refused(
    images: Renders, settings: dict[str, Any], autoencoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(autoencoder, tmp_path / "work/autoencoder")
    places = {"stage": "export", "folder": str(tmp_path / "work"), "export": str(tmp_path)}
    for seed in (1, 2):
        chosen = settings["denoiser"] | {"seed": seed, "steps": 9}
        train_denoiser(images.prompt, autoencoder, chosen, tmp_path / f"{seed}", 0.0)
    (tmp_path / "work/unet").mkdir()
    for seed in (1, 2):
        shutil.copy(tmp_path / f"{seed}/checkpoint.pt", tmp_path / f"work/unet/{seed}.pt")
    with pytest.raises(ValueError, match=r"2\.pt.* seed=1.* seed=2"):
        run(settings | places | {"checkpoints": ["1.pt", "2.pt"]}, "")
    with pytest.raises(ValueError, match=r"checkpoints=.*\[\]"):
        run(settings | places | {"checkpoints": []}, "")
    with pytest.raises(FileNotFoundError, match=r"3\.pt"):
        run(settings | places | {"checkpoints": ["3.pt"]}, "")
    config = tmp_path / "work/autoencoder/model/config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(ValueError, match=r"autoencoder=\w{16}.* autoencoder=\w{16}"):
        run(settings | places | {"checkpoints": ["1.pt"]}, "")
    assert not (tmp_path / "marionette").exists()
