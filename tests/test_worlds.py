"""Training, sampling and evaluation on the real models' worlds, by the commands, on tiny folders of the same layout."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rg.points import KEYPOINTS
from tests.families import MODELS, build

pytestmark = pytest.mark.slow
WORLDS = (*MODELS, "sd3")  # pipelines of SANA and Flux make 1024 and 512 pixels where no size is given


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a tiny pipeline of each model, and images of 32x32 with keypoints."""
    place = tmp_path_factory.mktemp("worlds")
    for model in WORLDS:
        build(model, tokenizer).save_pretrained(place / model)
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (place / name).mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(place / f"images/{number}.png")
        points = np.concatenate([rng.uniform(0, 31, (1, len(KEYPOINTS), 2)), np.ones((1, len(KEYPOINTS), 1))], -1)
        (place / f"labels/{number}.json").write_text(json.dumps({"keypoints": points.tolist()}))
    return place


def run(place: Path, root: Path, module: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` in an empty folder, with the repository on the path."""
    command = [sys.executable, "-m", module, *overrides]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(place)}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("model", WORLDS)
def test_a_world_trains_samples_and_evaluates(place, root, model):
    world = [
        f"world={model}",
        *(f"world.backbone.{key}" for key in (f"path={model}", "variant=null")),
        *(f"world.{key}" for key in ("projection_dim=16", "norm_groups=2", "hidden_channels=8", "output_scale=2")),
        *("world.resolution=32", "pictures.path=images", "pictures.labels=labels"),
    ]
    small = ["data.size=null", "data.val_size=null", "data.batch_size=4", "data.epoch_batches=2", "trainer.max_steps=2"]
    done = run(place, root, "rg.train", "+experiment=pose_100", f"name={model}", *world, *small)
    assert done.returncode == 0, done.stdout + done.stderr
    head = place / "outputs" / model / "latest" / "head"
    few = [f"head.path={head}", "images=2", "sampling.num_inference_steps=3", "guidance.readout_scale=10"]
    if model in ("pixart", "sana"):
        few.append("+sampling.use_resolution_binning=false")  # its tables begin at latents of 32x32
    if model == "sana":
        world.append("scheduler=flow_euler")  # that of the tiny pipeline
    done = run(place, root, "rg.sample", "+experiment=pose_control", *world, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    image = place / "outputs" / "pose_control" / "latest" / "00001.png"
    assert Image.open(image).size == (32, 32) and len(np.unique(np.asarray(Image.open(image)))) > 10
    judge = "+world.detectors.own={_target_:rg.detectors.KeypointDetector.from_pretrained,folder:detector}"
    done = run(place, root, "rg.evaluate", *world, *few, judge, "world.judges=[own]")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((place / "outputs" / "eval_pck" / "latest" / "results.json").read_text())
    assert results["images"] == 2
    other = "sd21" if model == "sd15" else "sd15"
    done = run(place, root, "rg.sample", "+experiment=pose_control", f"world={other}", f"head.path={head}",
               f"world.backbone.path={other}", "world.backbone.variant=null", "control=labels/0.json")  # fmt: skip
    assert done.returncode != 0 and done.stderr.strip().splitlines()[-1].startswith("error: head SpatialHead was made")


@pytest.mark.parametrize("path", ["nobody/nothing", "missing"])
def test_a_backbone_that_is_not_there_is_one_clear_error(place, root, path):
    done = run(place, root, "rg.sample", "+experiment=pose_control", "world=sdxl", f"world.backbone.path={path}")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and path in done.stderr
