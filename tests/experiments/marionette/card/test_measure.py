import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from data_prep.marionette.vocabulary import ATTRIBUTES
from experiments.marionette.card.measure import Card, run
from rg.detectors.attributes import AttributeClassifier
from rg.detectors.keypoints import KeypointDetector


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> dict[str, Any]:
    """The shipped model, judges with random weights, 4 samples of 2 steps."""
    KeypointDetector(widths=(8, 8, 8), threshold=0.0, finder_widths=(8, 8, 8)).save_pretrained(tmp_path / "detector")
    AttributeClassifier(attributes=ATTRIBUTES, widths=(8, 8, 8)).save_pretrained(tmp_path / "classifier")
    changes = ["images=4", "unseen=2", "changed=1", "batch_size=4", "parts=2", "sheet_images=4", "device=cpu"]
    changes += ["sampling.num_inference_steps=2", "latency.threads=1", "latency.images=2"]
    changes += ["latency.num_inference_steps=1", "latency.repeats=1"]
    changes += [f"{name}={tmp_path}/{name}" for name in ("detector", "classifier", "folder", "sheet", "record")]
    changes += [f"results={tmp_path}/results.json", f"card={tmp_path}/README.md"]
    with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose("experiments/marionette_card", changes), resolve=True)


@pytest.mark.slow
def test_everything_is_measured_and_written(settings: dict[str, Any], tmp_path: Path):
    Path(settings["record"]).write_text(json.dumps({"command": "python -m x", "unet": {"steps": 5, "seconds": 60}}))
    card = run(settings, "python -m card")
    results = json.loads(Path(settings["results"]).read_text())
    assert (tmp_path / "README.md").read_text() == card
    assert set(results["fidelity"]) == {"scale 1", "scale 2", "ceiling"} == set(results["kernel_distance"]["raw"])
    people = results["people_found"]["scale 1"]["one"]
    assert people["found"]["share"] == 1 and sum(people["confident"]) == people["found"]["count"] > 0
    assert set(results["changed_words"]) == {"shirt", "trousers", "hat", "hair"}
    assert results["unseen_pairs"]["samples"]["pair"]["count"] == 2
    assert [x["guidance_scale"] for x in results["latency"]] == [1.0, 2.0]
    parts = [
        "| unet | 5 | - | 1.0 |",
        "    python -m card\n",
        "shirt and trousers at once",
    ]
    assert not [part for part in parts if part not in card]
    assert max(map(len, (line for line in card.splitlines() if line[:1] not in "| "))) <= 120
    assert Image.open(settings["sheet"]).size == (1024, 128)


def test_a_second_run_samples_nothing(settings: dict[str, Any]):
    scenes = Card(settings).scenes("samples", 4)
    first = Card(settings).main_figures(scenes)[0]
    files = {path: path.stat().st_mtime_ns for path in Path(settings["folder"]).rglob("*.npz")}
    assert Card(settings).main_figures(scenes)[0] == first
    assert files and files == {path: path.stat().st_mtime_ns for path in Path(settings["folder"]).rglob("*.npz")}


def test_a_scale_that_is_not_sampled_is_refused(settings: dict[str, Any]):
    with pytest.raises(ValueError, match=r"scale: .*\[.*\].* 3\.0"):
        Card({**settings, "scale": 3.0})
