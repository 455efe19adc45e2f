import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from experiments.marionette.train import export


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
