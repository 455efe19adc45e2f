"""Heads on the model hub: what is uploaded, and where a name leads to. Nothing is sent."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from rg.heads import load_head
from rg.heads.hub import find_folder
from rg.heads.spatial import SpatialHead


@pytest.fixture
def head():
    return SpatialHead(
        variant="rgb",
        tap_channels=[8, 16],
        time_embed_dim=32,
        condition_dim=12,
        projection_dim=16,
        norm_groups=2,
        hidden_channels=8,
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Takes uploads and gives downloads by folders; says what was asked for."""
    asked = []

    def create(repo_id, **arguments):
        asked.append(("create", repo_id, arguments))
        return type("Repository", (), {"repo_id": repo_id})

    def upload(*, repo_id, folder_path, **arguments):
        asked.append(("upload", repo_id, arguments))
        shutil.copytree(folder_path, tmp_path / repo_id)
        return f"hub/{repo_id}"

    def download(repo_id, *, allow_patterns):
        asked.append(("download", repo_id, allow_patterns))
        if not (tmp_path / repo_id).is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("none")
        return str(tmp_path / repo_id)

    for name, call in (("create_repo", create), ("upload_folder", upload), ("snapshot_download", download)):
        monkeypatch.setattr(huggingface_hub, name, call)
    return asked


def test_a_pushed_head_is_found_by_its_name(head, hub, tmp_path):
    assert head.push_to_hub("somebody/pose", base_model="somebody/model", private=True) == "hub/somebody/pose"
    assert [what for what, *_ in hub] == ["create", "upload"] and hub[0][2]["private"] is True
    folder = tmp_path / "somebody/pose"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "head.json", "head.safetensors"]
    card = ModelCard.load(folder / "README.md")
    assert {"readout-guidance", "diffusers", "SpatialHead"} <= set(card.data.tags)
    assert card.data.base_model == "somebody/model" and 'load_head("somebody/pose")' in card.text
    for loaded in (load_head("somebody/pose"), SpatialHead.from_pretrained("somebody/pose")):
        assert all(value.equal(head.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert hub[-1][2] == ["*.json", "*.safetensors"]


def test_names_that_lead_nowhere(head, hub):
    with pytest.raises(FileNotFoundError, match=r"repository of the hub 'nobody/none', which gave LocalEntry"):
        load_head("nobody/none")
    with pytest.raises(FileNotFoundError, match="expected a path or a shipped name"):
        find_folder("a/b/c", "heads")
    with pytest.raises(ValueError, match="repo_id: expected owner/name, got 'pose'"):
        head.push_to_hub("pose")
    assert [what for what, *_ in hub] == ["download"]


def test_what_lies_here_comes_first(head, hub, tmp_path, monkeypatch):
    head.save_pretrained(tmp_path / "own/head")
    monkeypatch.chdir(tmp_path)
    assert find_folder("own/head") == Path("own/head") and load_head("pose_8k5") and not hub
