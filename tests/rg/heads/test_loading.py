"""Loading a head whose class is not of this package: the user names it, a folder cannot."""

import json
import re
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from rg.cli import load_configured_head
from rg.heads import load_head

MODULE = """
import math

from rg.heads import SpatialHead


class NarrowHead(SpatialHead):
    def __init__(self, *, steepness=1.0, **hyperparameters):
        super().__init__(**hyperparameters)

    def forward(self, features, time_embedding):
        return self.hparams.steepness * super().forward(features, time_embedding)
"""
WIDTHS = {"tap_channels": [8], "time_embed_dim": 6, "projection_dim": 16, "norm_groups": 2, "hidden_channels": 8}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a NarrowHead; own_heads, where its class is, and own_broken can be imported."""
    (tmp_path / "own_heads.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("import absent_library")
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    import own_heads

    own_heads.NarrowHead(steepness=3.0, **WIDTHS).save_pretrained(tmp_path / "head")
    yield tmp_path / "head"
    del sys.modules["own_heads"]


def test_the_class_that_the_user_names_is_loaded(folder):
    head = load_head(folder, "own_heads.NarrowHead")
    assert (type(head).__module__, type(head).__name__, head.hparams.steepness) == ("own_heads", "NarrowHead", 3.0)
    assert not head.training and not any(parameter.requires_grad for parameter in head.parameters())


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands_take_the_class(root, folder, command):
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        plain = compose(command, [f"head.path={folder}"])
        named = compose(command, [f"head.path={folder}", "head.class=own_heads.NarrowHead"])
    assert type(load_configured_head(named.head, "marionette")).__name__ == "NarrowHead"
    with pytest.raises(ValueError, match=r"'NarrowHead'.*head\.class=module\.Class"):
        load_configured_head(plain.head, "marionette")


@pytest.mark.parametrize("named", ["own_trap.NarrowHead", "own_trap", "NarrowHead"])
def test_nothing_that_a_folder_names_is_imported(folder, tmp_path, named):
    (tmp_path / "own_trap.py").write_text("raise SystemExit('a trap')")
    del sys.modules["own_heads"]
    record = json.loads((folder / "head.json").read_text())
    (folder / "head.json").write_text(json.dumps({**record, "class": named, "_target_": "own_trap.NarrowHead"}))
    with pytest.raises(ValueError, match=f"found '{named}'"):
        load_head(folder)
    assert not {"own_heads", "own_trap"} & set(sys.modules)
    import own_heads  # noqa: F401  the fixture takes it away


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("NarrowHead", "ReadoutHead"),
        ("", "ReadoutHead"),
        (".own_heads.NarrowHead", "ReadoutHead"),
        ("own-heads.NarrowHead", "ReadoutHead"),
        (3, "ReadoutHead"),
        ("own_head.NarrowHead", "No module named 'own_head'"),
        ("own_broken.NarrowHead", "No module named 'absent_library'"),
        ("own_heads.NarowHead", "nothing .*own_heads"),
        ("own_heads.math", "<module 'math'.*own_heads"),
        ("collections.Counter", "<class 'collections.Counter'>.*collections"),
    ],
)
def test_a_name_that_leads_to_no_head_is_one_error(folder, named, message):
    with pytest.raises(ValueError, match=rf"class={re.escape(str(named))}: .*module\.Class.*{message}"):
        load_head(folder, named)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class": None}, "class: expected .*string, found None"),
        ({"class": 3}, "class: expected .*string, found 3"),
        ({"hyperparameters": None}, "hyperparameters: expected .*found None"),
        ({"hyperparameters": []}, r"hyperparameters: expected .*found \[\]"),
        ({"hyperparameters": {}}, "NarrowHead.*tap_channels"),
        ({"hyperparameters": WIDTHS | {"tap_channels": 8}}, "tap_channels: .*found 8"),
        ({"hyperparameters": WIDTHS | {"tap_channels": [8.5]}}, r"tap_channels\.0: .*found 8\.5"),
        ({"hyperparameters": WIDTHS | {"projection_dim": "16"}}, "projection_dim: .*integer, found '16'"),
        ({"hyperparameters": WIDTHS | {"projection_dim": -16}}, "NarrowHead"),
        ({"hyperparameters": WIDTHS | {"norm_groups": 3}}, "norm_groups: .*4.* 3"),
        ({"hyperparameters": WIDTHS | {"taps": [7]}}, "NarrowHead"),
        ({"hyperparameters": WIDTHS | {"colour": 1}}, "colour: expected one of .*'steepness'.*'taps'.* found 1"),
    ],
)
def test_a_damaged_record_is_one_line(folder, change, words):
    path = folder / "head.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"^{path}: .*{words}") as error:
        load_head(folder, "own_heads.NarrowHead")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "JSON"),
        (b"[]", r"found \[\]"),
        (b"{}", "class: expected this key, found none"),
        (b"\xff{}", "UTF-8.*0xff"),
        (b'{"class": "SpatialHead"}', "hyperparameters: expected this key, found none"),
        (b'{"class": NaN}', "NaN"),
        (b'{"class": ' + b"[" * 20_000, "levels, found 20,001"),
    ],
)
def test_a_record_that_is_none_is_one_line(folder, data, words):
    (folder / "head.json").write_bytes(data)
    for class_path in (None, "own_heads.NarrowHead"):
        with pytest.raises(ValueError, match=rf"^{folder}/head.json: .*{words}"):
            load_head(folder, class_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_training_leaves_are_refused(folder, value):
    tensors = load_file(folder / "head.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "head.safetensors")
    with pytest.raises(ValueError, match=rf"^{folder}/head.safetensors: {name}: .*found {value:g}".replace("+", r"\+")):
        load_head(folder, "own_heads.NarrowHead")


def test_the_random_state_is_that_of_making_a_head_once(folder):
    import own_heads

    torch.manual_seed(0)
    own_heads.NarrowHead(**WIDTHS)
    expected = torch.rand(4)
    torch.manual_seed(0)
    load_head(folder, "own_heads.NarrowHead")
    assert torch.equal(torch.rand(4), expected)


def test_another_class_than_the_folder_holds_is_named(folder):
    with pytest.raises(ValueError, match="SpatialHead.* NarrowHead"):
        load_head(folder, "rg.heads.spatial.SpatialHead")
    with pytest.raises(FileNotFoundError, match="head.json and head.safetensors"):
        load_head(folder.parent, "own_heads.NarrowHead")
