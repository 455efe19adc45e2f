"""Images after a reference, by the embedded model and heads with random weights."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from rg import edit as command
from rg.backbone.diffusion import DiffusionBackbone
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.spatial import SpatialHead

SMALL = {"projection_dim": 16, "norm_groups": 2, "output_scale": 2}


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    backbone = DiffusionBackbone.from_pretrained("marionette", device="cpu")
    widths = {"tap_channels": backbone.tap_channels, "time_embed_dim": backbone.time_embed_dim, **SMALL}
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("heads")
    for name, kind in (("look", AppearanceHead), ("point", CorrespondenceHead), ("map", SpatialHead)):
        kind(**widths).save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(root, heads, tmp_path, monkeypatch):
    """Images and trace of a command: `run("heads=[look]", "images=2")`."""

    def call(*overrides):
        traces = []
        attach = command.ReadoutGuidance.attach
        monkeypatch.setattr(
            command.ReadoutGuidance, "attach", lambda self, pipe: traces.append(self) or attach(self, pipe)
        )
        monkeypatch.chdir(heads)
        words = ["sampling.num_inference_steps=4", f"run_dir={tmp_path}", *overrides]
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            images = command.edit(compose("edit", words), tmp_path / "run")
        return images, traces[0].trace if traces else None

    return call


def mean_energy(trace):
    return float(torch.stack([step.energy for step in trace]).mean())


def test_variations_come_nearer_to_the_reference(run, tmp_path):
    guided, trace = run("heads=[look]", "images=2", "guidance.readout_scale=0.1")
    plain, free = run("heads=[look]", "images=2", "guidance.readout_scale=0.0")
    assert guided.shape == (2, 3, 64, 64) and not torch.equal(guided[0], guided[1])
    assert mean_energy(trace) < mean_energy(free)
    assert len(trace) == 4 and all((step.energy > 0).all() for step in trace)
    for name in ("reference", "00000", "00001"):
        assert Image.open(tmp_path / "run" / f"{name}.png").size == (64, 64)
    assert (tmp_path / "run" / "grid.png").is_file()


def test_from_the_same_noise_the_first_readout_is_the_references_own(run):
    _, trace = run("heads=[look]", "images=1", "noise=reference")
    assert float(trace[0].energy) == pytest.approx(0, abs=1e-5)


def test_a_drag_compares_its_two_ends(run):
    """Dragged nowhere, the energy is that of a vector with itself: -1."""
    _, still = run("heads=[point]", "images=1", "noise=reference", "drag=[[20,30,20,30]]")
    assert float(still[0].energy) == pytest.approx(-1, abs=1e-5)
    words = ["heads=[look,point]", "weights=[0.0,2.0]", "classes=[null,rg.heads.CorrespondenceHead]"]
    _, moved = run(*words, "images=1", "noise=reference", "drag=[[20,30,44,12]]")
    assert -2 < float(moved[0].energy) < -1e-3


def test_a_real_image_is_inverted_and_comes_back(run, tmp_path):
    run("heads=[look]", "images=1")
    Image.open(tmp_path / "run" / "reference.png").convert("RGB").resize((96, 64)).save(tmp_path / "photo.png")
    words = ["heads=[look]", "images=1", f"reference={tmp_path}/photo.png", "sampling.num_inference_steps=20"]
    run(*words)
    square = Image.open(tmp_path / "photo.png").crop((16, 0, 80, 64))
    back = Image.open(tmp_path / "run" / "reference.png")
    error = np.asarray(square, dtype=float) - np.asarray(back, dtype=float)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 18


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["heads=[]"], "expected one weight for each of some heads"),
        (["heads=[look]", "weights=[1,2]"], "expected one weight for each of some heads"),
        (["heads=[look]", "classes=[null,null]"], "classes: expected one or null for each of heads"),
        (["heads=[look]", "classes=[rg.heads.CorrespondenceHead]"], "expected a CorrespondenceHead, found a App"),
        (["heads=[look]", "classes=[nowhere.Head]"], "class=nowhere.Head: .*No module named 'nowhere'"),
        (["heads=[map]"], "compare with a reference, found a SpatialHead"),
        (["heads=[nowhere]"], "nowhere"),
        (["heads=[point]"], "drag: expected one with a correspondence head"),
        (["heads=[look]", "drag=[[1,1,2,2]]"], "drag: expected one with a correspondence head"),
        (["heads=[point]", "drag=[[1,1,2]]"], "drag: expected some lists of 4 numbers"),
        (["heads=[point]", "drag=[[1,1,80,2]]"], "drag: expected places inside 64x64 pixels"),
        (["heads=[look]", "boxes=[[0,0,64,64]]"], "boxes: expected 2 lists of 4 numbers"),
        (["heads=[look]", "boxes=[[0,0,64,64],[9,9,9,20]]"], "boxes: expected places inside"),
        (["heads=[look]", "noise=old"], "expected at least 1, and new or reference"),
        (["heads=[look]", "reference=missing.png"], r"missing\.png"),
        (["heads=[look]", "reference=missing.png", "scheduler=euler"], "expected scheduler=ddim"),
    ],
)
def test_bad_words_are_refused_before_sampling(run, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(*words)


def test_boxes_are_compared_alone(run):
    """The same box of the same image is the same; another is not."""
    same = "[[0,0,32,64],[0,0,32,64]]"
    _, trace = run("heads=[look]", "images=1", "noise=reference", f"boxes={same}")
    assert float(trace[0].energy) == pytest.approx(0, abs=1e-5)
    _, trace = run("heads=[look]", "images=1", "noise=reference", "boxes=[[0,0,32,64],[32,0,64,64]]")
    assert float(trace[0].energy) > 1e-4
