"""Images after a reference, by the embedded model and heads with random weights."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from data_prep.marionette.render import render
from rg.backbone.diffusion import DiffusionBackbone
from rg.edit import Edit, Frame, parse_boxes, parse_drag
from rg.guidance.guidance import ReadoutGuidance
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.spatial import SpatialHead

ROOT = Path(__file__).parents[2]
SMALL = {"projection_dim": 16, "norm_groups": 2, "output_scale": 2}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    backbone = DiffusionBackbone.from_pretrained("marionette", device="cpu")
    widths = {"tap_channels": backbone.tap_channels, "time_embed_dim": backbone.time_embed_dim, **SMALL}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("heads")
    for name, kind in (("style", AppearanceHead), ("point", CorrespondenceHead), ("map", SpatialHead)):
        kind(**widths).save_pretrained(folder / name)
    return folder


@pytest.fixture
def make(root, heads, tmp_path, monkeypatch):
    """What a command makes of its words: `make("terms=[style]", "images=2")`."""

    def call(*overrides):
        monkeypatch.chdir(heads)
        words = ["sampling.num_inference_steps=4", f"run_dir={tmp_path}", *overrides]
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            return Edit(compose("edit", words), tmp_path / "run")

    return call


@pytest.fixture
def run(make):
    """Images and trace of a command."""

    def call(*overrides):
        edit = make(*overrides)
        return edit.run(), edit.trace

    return call


def mean_energy(trace):
    return float(torch.stack([step.energy for step in trace]).mean())


@pytest.mark.slow
def test_variations_come_nearer_to_the_reference(run, tmp_path):
    guided, trace = run("terms=[style]", "images=2", "guidance.readout_scale=0.1")
    plain, free = run("terms=[style]", "images=2", "guidance.readout_scale=0.0")
    assert guided.shape == (2, 3, 64, 64) and not torch.equal(guided[0], guided[1])
    assert mean_energy(trace) < mean_energy(free)
    assert len(trace) == 4 and all((step.energy > 0).all() for step in trace)
    for name in ("reference", "00000", "00001"):
        assert Image.open(tmp_path / "run" / f"{name}.png").size == (64, 64)
    assert (tmp_path / "run" / "grid.png").is_file()


def test_from_the_same_noise_the_first_readout_is_the_references_own(run):
    _, trace = run("terms=[style]", "images=1", "noise=reference")
    assert float(trace[0].energy) == pytest.approx(0, abs=1e-5)


def test_a_drag_compares_its_two_ends(run):
    """Dragged nowhere, the energy is that of a vector with itself: -1."""
    _, still = run("terms=[point]", "images=1", "noise=reference", "drag=[[20,30,20,30]]")
    assert float(still[0].energy) == pytest.approx(-1, abs=1e-5)
    point = "{head: point, weight: 2.0, class: rg.heads.CorrespondenceHead}"
    words = [f"terms=[{{head: style, weight: 0.0}},{point}]"]
    _, moved = run(*words, "images=1", "noise=reference", "drag=[[20,30,44,12]]")
    assert -2 < float(moved[0].energy) < -1e-3


def test_a_real_image_is_inverted_and_comes_back(make, tmp_path):
    pixels = torch.nn.functional.pad(render([(0, 0, 0)]).image[0], (16, 16), value=255)  # 64 rows, 96 columns
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    edit = make("terms=[style]", f"reference={tmp_path}/photo.png", "sampling.num_inference_steps=20")
    noise = edit.reference_noise()
    guidance = ReadoutGuidance(edit.terms(noise))
    back = edit.reference(noise, guidance)
    error = (pixels[None, :, :, 16:80] - (back + 1) * 127.5).square().mean()
    assert 10 * torch.log10(255**2 / error) > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["terms=[]"], r"terms: .*list.*\[\]"),
        (["terms=style"], "terms: .*list.* style"),
        (["terms=[style,{head: style, wait: 2}]"], r"terms\[1\]: .*wait"),
        (["terms=[{head: style, weight: much}]"], r"terms\[0\]\.weight: .*number.*'much'"),
        (["terms=[{weight: 1}]"], r"terms\[0\]: .*{head: NAME.*weight.* 1}"),
        (["terms=[{head: style, class: rg.heads.CorrespondenceHead}]"], "CorrespondenceHead.* AppearanceHead"),
        (["terms=[{head: style, class: nowhere.Head}]"], "class=nowhere.Head: .*No module named 'nowhere'"),
        (["terms=[map]"], r"terms\[0\]\.head: .*SpatialHead"),
        (["terms=[nowhere]"], "nowhere"),
        (["terms=[point]"], "drag: .*correspondence head.*drag=None"),
        (["terms=[style]", "drag=[[1,1,2,2]]"], r"drag: .*correspondence head.*drag=\[\[1, 1, 2, 2\]\]"),
        (["terms=[point]", "drag=[[1,1,2]]"], r"drag: .*from x.*\[\[1, 1, 2\]\]"),
        (["terms=[point]", "drag=[[1,1,80,2]]"], r"drag: .*64x64.*\[\[1, 1, 80, 2\]\]"),
        (
            ["terms=[point]", "drag=[[9,9,250,9]]", f"reference={ROOT}/docs/grid.png"],
            r"drag: .*\d+x\d+ pixels, in \[\d+, 0, .*\[\[9, 9, 250, 9\]\]",
        ),
        (["terms=[style]", "boxes=[[0,0,64,64]]"], r"boxes: .*2 lists.*\[\[0, 0, 64, 64\]\]"),
        (["terms=[style]", "boxes=[[0,0,64,64],[9,9,9,20]]"], r"boxes: .*64x64.*\[9, 9, 9, 20\]"),
        (["terms=[style]", "noise=old"], "noise: .*new or reference.* old"),
        (["terms=[style]", "reference=missing.png"], r"missing\.png"),
        (["terms=[style]", "reference=missing.png", "scheduler=euler"], "reference: .*scheduler=ddim.* euler"),
    ],
)
def test_bad_words_are_refused_before_sampling(run, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*words)


@pytest.mark.slow
def test_boxes_are_compared_alone(run):
    """The same box of the same image is the same; another is not."""
    same = "[[0,0,32,64],[0,0,32,64]]"
    _, trace = run("terms=[style]", "images=1", "noise=reference", f"boxes={same}")
    assert float(trace[0].energy) == pytest.approx(0, abs=1e-5)
    _, trace = run("terms=[style]", "images=1", "noise=reference", "boxes=[[0,0,32,64],[32,0,64,64]]")
    assert float(trace[0].energy) > 1e-4


@pytest.mark.parametrize(
    ("given", "drag", "made"),
    [
        ((256, 256), [[128, 100, 160, 100]], [[31.625, 24.625], [39.625, 24.625]]),
        ((256, 384), [[64, 0, 192, 100]], [[-0.375, -0.375], [31.625, 24.625]]),  # the crop begins at x = 64
    ],
)
def test_places_are_in_pixels_of_the_image_that_was_given(given, drag, made):
    frame = Frame(given, (64, 64))
    torch.testing.assert_close(parse_drag(drag, frame), torch.tensor([made]))
    left = frame.box[0]
    boxes = parse_boxes([[left, 0, left + 128, 256], [left + 128, 64, left + 256, 256]], frame)
    assert boxes.tolist() == [[0, 0, 32, 64], [32, 16, 64, 64]]


@pytest.mark.parametrize("words", [["guidance=released"], ["guidance.branch=both"]])
def test_a_real_reference_is_read_under_the_branches_that_guide(run, tmp_path, words):
    Image.new("RGB", (64, 64), (60, 120, 180)).save(tmp_path / "photo.png")
    guided, trace = run("terms=[style]", "images=1", f"reference={tmp_path}/photo.png", "prompt=grass", *words)
    assert guided.shape == (1, 3, 64, 64) and trace


def test_images_of_another_size_are_edited(run, tmp_path):
    Image.new("RGB", (256, 128), (60, 120, 180)).save(tmp_path / "photo.png")
    words = ["+sampling.height=32", "+sampling.width=64", f"reference={tmp_path}/photo.png"]
    guided, _ = run("terms=[style]", "images=1", *words, "+sampling.negative_prompt=[blurry]")
    assert guided.shape == (1, 3, 32, 64)
    assert Image.open(tmp_path / "run/reference.png").size == (64, 32)
