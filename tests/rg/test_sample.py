import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from rg.backbone.diffusion import DiffusionBackbone
from rg.data.shards import read_shards
from rg.heads.appearance import AppearanceHead
from rg.heads.spatial import SpatialHead
from rg.sample import read_controls

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
    wanted = samples.keypoints if variant == "keypoints" else samples.label / 127.5 - 1
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
        (lambda: SpatialHead(**WIDTHS), 32, r"control: .*\(B,3,64,64\).*\(1, 3, 32, 32\)"),
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
