"""Loading a head whose class is not of this package: the user names it, a folder cannot."""

import json
import re
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir

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


def test_another_class_than_the_folder_holds_is_named(folder):
    with pytest.raises(ValueError, match="SpatialHead.* NarrowHead"):
        load_head(folder, "rg.heads.spatial.SpatialHead")
    with pytest.raises(FileNotFoundError, match="head.json and head.safetensors"):
        load_head(folder.parent, "own_heads.NarrowHead")
