import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from data_prep.cropping import crop_image
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.shards import read_shards
from rg.heads.appearance import AppearanceHead
from rg.heads.spatial import SpatialHead
from rg.io.images import load_control
from rg.sample import read_controls, sample

WIDTHS = {"tap_channels": [8], "time_embed_dim": 6, "projection_dim": 16, "norm_groups": 2}


@pytest.fixture(scope="module")
def backbone():
    return DiffusionBackbone.from_pretrained("marionette")


@pytest.fixture
def controls(root, tmp_path, backbone):
    """The controls (N, ...) and prompts of a sampling command: `controls("depth", head, "images=2")`."""

    def read(task, head, *overrides):
        words = [f"+experiment={task}_control", f"data.builder.root={tmp_path}/{task}", "run_dir=unused", *overrides]
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            config = compose("sample", words)
        target, prompts = read_controls(config, backbone, head)
        return target.control, prompts

    return read


@pytest.mark.parametrize(
    ("task", "variant"), [("pose", "keypoints"), ("pose", "rgb"), ("depth", "rgb"), ("edge", "rgb")]
)
def test_controls_are_the_labels_of_held_out_images(tmp_path, controls, task, variant):
    control, prompts = controls(task, SpatialHead(**WIDTHS, variant=variant), "images=2", "pose=1")
    samples = read_shards(tmp_path / task / "test")
    wanted = samples.keypoints if variant == "keypoints" else samples.decoded("label") / 127.5 - 1
    assert len(wanted) == 3
    torch.testing.assert_close(control, wanted[1:])
    assert prompts == samples.prompt[1:]
    assert controls(task, SpatialHead(**WIDTHS, variant=variant), "images=1", "prompt=grass")[1] == ["grass"]


@pytest.mark.parametrize("task", ["depth", "edge"])
def test_an_image_is_a_control(tmp_path, controls, task):
    Image.new("L", (64, 64), 255).save(tmp_path / "image.png")
    control, prompts = controls(task, SpatialHead(**WIDTHS), "images=2", f"control={tmp_path}/image.png")
    assert torch.equal(control, torch.ones(1, 3, 64, 64)) and prompts == ["", ""]


@pytest.mark.parametrize(
    ("make", "side", "words"),
    [
        (lambda: SpatialHead(**WIDTHS, variant="keypoints"), 64, r"control: .*variant=keypoints .*\(B,P,18,3\)"),
        (lambda: AppearanceHead(**WIDTHS), 64, "control: AppearanceHead .*reference image"),
    ],
)
def test_a_control_that_does_not_fit_is_refused_before_any_image(tmp_path, controls, make, side, words):
    Image.new("RGB", (side, side)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match=words):
        controls("depth", make(), f"control={tmp_path}/image.png")


def test_labels_cannot_be_the_control_of_a_relative_head(controls):
    with pytest.raises(ValueError, match="control: AppearanceHead .*reference image"):
        controls("depth", AppearanceHead(**WIDTHS), "images=1")


@pytest.mark.parametrize("size", [(128, 128), (150, 97), (32, 40)])
def test_an_image_of_another_size_is_fitted_as_preparation_does(tmp_path, controls, caplog, size):
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(*size[::-1], 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    with caplog.at_level("INFO"):
        control, _ = controls("depth", SpatialHead(**WIDTHS), f"control={tmp_path}/image.png")
    torch.testing.assert_close(control[0], crop_image(image, 64) / 127.5 - 1)
    assert f"{size[0]}x{size[1]}" in caplog.text and "64x64" in caplog.text


@pytest.mark.parametrize("source", ["file", "labels"])
def test_keypoints_are_those_of_the_images_that_are_made(root, controls, source):
    head, made = SpatialHead(**WIDTHS, variant="keypoints"), ["+sampling.height=96", "+sampling.width=128"]
    words = ["images=1", *([f"control={root}/docs/pose.json"] if source == "file" else [])]
    (own, _), (moved, _) = (controls("pose", head, *words, *more) for more in ([], made))
    scale = torch.tensor([128 / 64, 96 / 64])
    torch.testing.assert_close(moved[..., :2], (own[..., :2] + 0.5) * scale - 0.5)
    assert torch.equal(moved[..., 2], own[..., 2])
    if source == "file":
        assert torch.equal(moved, load_control(root / "docs/pose.json", (96, 128)))


def test_labels_are_resized_to_the_images_that_are_made(controls):
    control, _ = controls("depth", SpatialHead(**WIDTHS), "images=1", "+sampling.height=32", "+sampling.width=64")
    assert control.shape == (1, 3, 32, 64)


def test_an_empty_prompt_is_a_prompt(controls):
    assert controls("depth", SpatialHead(**WIDTHS), "images=2", "prompt=''")[1] == ["", ""]


def test_a_run_takes_negative_prompts_and_keeps_no_readouts(root, tmp_path):
    words = ["+experiment=pose_control", f"control={root}/docs/pose.json", "images=2", f"run_dir={tmp_path}/run"]
    words += [
        "+sampling.negative_prompt=[blurry,dark]",
        "guidance.keep_readouts=false",
        "sampling.num_inference_steps=2",
    ]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        config = compose("sample", [*words, "+sampling.height=64", "+sampling.width=96"])
    assert sample(config, tmp_path / "run").shape == (2, 3, 64, 96)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"00000.png", "00001.png", "grid.png"}
