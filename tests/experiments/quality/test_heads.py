"""The command on two tiny heads of the embedded model; what the baselines are, by hand."""

import json

import pytest
import torch

from experiments.quality.heads import read_results, run, tables
from experiments.quality.spatial import guesses, spatial_estimates
from rg.backbone.diffusion import DiffusionBackbone
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.spatial import SpatialHead

WIDTHS = {"projection_dim": 16, "norm_groups": 2, "output_scale": 2, "val_timesteps": [300]}


@pytest.fixture(scope="module")
def embedded():
    return DiffusionBackbone.from_pretrained("marionette", device="cpu")


@pytest.fixture
def folders(tmp_path, embedded):
    widths = {"tap_channels": embedded.tap_channels, "time_embed_dim": embedded.time_embed_dim, **WIDTHS}
    torch.manual_seed(0)
    SpatialHead(**widths, scores="depth", sparse=False).save_pretrained(tmp_path / "depth")
    CorrespondenceHead(**widths).save_pretrained(tmp_path / "correspondence")
    return tmp_path


def test_what_can_be_said_without_looking():
    points = torch.tensor([[[1.0, 2.0], [5.0, 5.0]], [[3.0, 4.0], [9.0, 9.0]]])
    visible = torch.tensor([[True, True], [True, False]])
    (mean,) = guesses((points, visible))
    assert mean.tolist() == [[[2.0, 3.0], [5.0, 5.0]]] * 2
    maps = torch.stack([torch.zeros(2, 2), torch.eye(2)])
    average, white = guesses((maps,))
    assert average.tolist() == [[[0.5, 0.0], [0.0, 0.5]]] * 2 and (white == 1).all()


def test_an_estimate_is_the_heads_own_score(embedded):
    """A head that reads the label itself is perfect; the baseline is not."""

    class Seer(SpatialHead):
        def readout_at(self, batch, timestep):
            return batch["label"] / 2

    widths = {"tap_channels": embedded.tap_channels, "time_embed_dim": embedded.time_embed_dim, **WIDTHS}
    ramp = torch.linspace(0.2, 1, 16).expand(16, 16)
    labels = torch.stack([ramp, ramp.T, ramp.flip(1)])[:, None].expand(-1, 3, -1, -1) * 2 - 1
    samples = [{"label": label} for label in labels]
    found = spatial_estimates(Seer(**widths, scores="depth", control_range=(-0.5, 0.5)), samples)
    good = found["delta1.25, t=300"]
    assert (good.ours, good.low, good.high, good.n) == (1.0, 1.0, 1.0, 3) and good.baseline < 0.9
    error = found["si_log, t=300"]
    assert error.ours == pytest.approx(0, abs=1e-6) and error.baseline > 0.1


@pytest.mark.slow
def test_the_command_keeps_what_others_found(folders, monkeypatch):
    monkeypatch.chdir(folders)
    out = folders / "readouts.json"
    out.write_text(json.dumps({"other": {"score, t=1": {"ours": 1.0}}}))
    names = {name: folders / name for name in ("depth", "correspondence")}
    text = run(names, "marionette", 3, out, "the command")
    found = json.loads(out.read_text())
    assert found["other"] == {"score, t=1": {"ours": 1.0}}
    assert set(found["depth"]) == {"si_log, t=300", "delta1.25, t=300"}
    for value in (*found["depth"].values(), found["correspondence"]["PCK@0.1, t=300"]):
        assert set(value) == {"ours", "low", "high", "baseline", "n", "command"}
        assert value["low"] <= value["ours"] <= value["high"] and value["n"] == 3 and value["command"] == "the command"
    assert text == tables({name: found[name] for name in ("depth", "correspondence")})
    assert "| depth | t = 300 |" in text and "other" not in text


def test_a_damaged_record_is_named_before_any_work(tmp_path):
    (tmp_path / "readouts.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"readouts\.json: .*found \[1\]"):
        read_results(tmp_path / "readouts.json")
