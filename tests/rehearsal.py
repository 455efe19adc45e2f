"""Every command on tiny random models of real layouts, in half precision, on pictures of COCO's layout.

python -m tests.rehearsal takes the folder to work in, else makes one, and prints what it runs and for how long.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from PIL import Image

from rg.detectors.keypoints import KeypointDetector
from tests.families import build

ROOT = Path(__file__).parents[1]
SIDE, PICTURES = 32, 8
# model: the world it is of, and what its pipeline asks for beside the prompt
MODELS = {
    "sdxl": ("sdxl", []),
    "sdxl_controlnet": ("sdxl", ["+sampling.image=skeleton.png"]),
    "pixart": ("pixart", ["+sampling.use_resolution_binning=false"]),  # its tables begin at latents of 32x32
}
POSE = np.stack([np.linspace(8, 40, 17), 4 + 2 * np.arange(17)], -1)  # of a person in a picture of 60 x 40


def lay_out(place: Path) -> None:
    """Pipelines, a detector, and eight pictures of people as COCO's archives have them."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "rg/models/marionette/tokenizer")
    for model in MODELS:
        build(model, tokenizer, dtype=torch.float16).save_pretrained(place / model, variant="fp16")
    torch.manual_seed(0)
    KeypointDetector(widths=[8, 8, 8], finder_widths=[8, 8, 8], threshold=0.5).save_pretrained(place / "detector")
    rng, people, images = np.random.default_rng(0), [], []
    for name in ("val2017", "annotations"):
        (place / "coco" / name).mkdir(parents=True)
    (place / "labels").mkdir()
    for number in range(PICTURES):
        name, points = f"{number:012}", POSE + rng.normal(0, 1, POSE.shape)
        Image.fromarray(rng.integers(256, size=(40, 60, 3), dtype=np.uint8)).save(place / f"coco/val2017/{name}.jpg")
        keypoints = np.concatenate([points, np.full((17, 1), 2)], -1)
        people.append(
            {"image_id": number, "iscrowd": 0, "num_keypoints": 17, "keypoints": np.ravel(keypoints).tolist()}
        )
        images.append({"id": number, "file_name": f"{name}.jpg"})
        # What an annotator finds in it: 18 keypoints, of which the second is the neck.
        found = np.concatenate([keypoints[:1], keypoints[5:7].mean(0, keepdims=True), keypoints[1:]])
        record = {"keypoints": [np.clip(found, 0, 39).tolist()]}
        (place / f"labels/{name}.json").write_text(json.dumps(record))
    (place / "pose.json").write_text(json.dumps({"size": [40, 60], **record}))
    captions = [{"image_id": number, "caption": f"a person, {number}"} for number in range(PICTURES)]
    for kind, records in (("person_keypoints", people), ("captions", captions)):
        path = place / f"coco/annotations/{kind}_val2017.json"
        path.write_text(json.dumps({"images": images, "annotations": records}))
    Image.fromarray(rng.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(place / "skeleton.png")


def commands(model: str) -> list[list[str]]:
    """What a user types for one model, from pictures to results."""
    world, extra = MODELS[model]
    small = [f"world={world}", f"world.backbone.path={model}", "world.backbone.variant=fp16"]
    small += [f"world.resolution={SIDE}", "world.projection_dim=16", "world.norm_groups=2", "world.hidden_channels=8"]
    coco = [
        "pictures=coco",
        "pictures.path=coco",
        f"pictures.images={PICTURES}",
        f"data.builder.root=data/{model}_coco",
    ]
    own = ["pictures.path=coco/val2017", "pictures.labels=labels", "pictures.test_share=0"]
    own += [f"data.builder.root=data/{model}_own", "data.size=null", "data.val_size=null"]
    steps = ["data.batch_size=4", "data.epoch_batches=2", "trainer.max_steps=4", "trainer.check_val_every_n_epoch=1"]
    use = [f"head.path=outputs/{model}/latest/head", "images=2", "sampling.num_inference_steps=3", *extra]
    tiny = "{_target_: rg.detectors.KeypointDetector.from_pretrained, folder: detector}"
    judge = [f"+world.detectors.tiny={tiny}", "world.judges=[tiny]"]
    coco.append("data.builder.shard_size=4")
    return [
        ["data_prep.prepare", "data=pose", "split=test", "engine.workers=2", *small, *coco],
        ["data_prep.prepare", "data=pose", *small, *own[:-2]],
        ["rg.train", "+experiment=pose_100", f"name={model}", *small, *own, *steps],
        ["rg.sample", "+experiment=pose_control", f"name={model}_sample", *small, *use, "control=pose.json"],
        ["rg.evaluate", f"name={model}_eval", *small, *coco, *use, *judge, "engine.workers=2", "batch_size=1"],
    ]


def rehearse(place: Path, say: Callable[[str], None] = print) -> dict[str, float]:
    """Runs all commands in an empty folder.

    Returns:
        Seconds of each, by "<model> <module>".

    Raises:
        RuntimeError: one failed; with what it said.
    """
    lay_out(place)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "HOME": str(place)}
    seconds: dict[str, float] = {}
    for model in MODELS:
        for module, *words in commands(model):
            command, begin = [sys.executable, "-m", module, *words], time.monotonic()
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1800)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(['python', *command[1:]])}\n{done.stdout}{done.stderr}")
            key = f"{model} {module}"
            seconds[key] = seconds.get(key, 0) + time.monotonic() - begin
            say(f"{seconds[key]:6.1f} s  {shlex.join(['python', *command[1:]])}")
    return seconds


def main() -> None:
    """Rehearses in the folder that is given, and sums up."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        place.mkdir(parents=True, exist_ok=True)
        seconds = rehearse(place)
        print(f"{sum(seconds.values()):.0f} s in all")
        for model in MODELS:
            print((place / f"outputs/{model}_eval/latest/table.md").read_text())


if __name__ == "__main__":
    main()
