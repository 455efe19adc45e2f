from pathlib import Path

import pytest
import torch

from experiments.marionette.record import is_done, read_settings, save, write_note


def test_a_file_is_whole_or_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save(path, {"x": torch.ones(2), "step": 3})
    with pytest.raises(AttributeError):
        save(path, {"x": lambda: 0})  # cannot be written
    state = torch.load(path, weights_only=True)
    assert state["step"] == 3 and state["x"].tolist() == [1, 1]


def test_a_note_holds_for_its_settings(tmp_path: Path) -> None:
    path, settings = tmp_path / "done.json", {"widths": [1, 2], "rate": 1e-3, "none": None}
    assert not is_done(path, settings) and read_settings(path) is None
    write_note(path, settings, {"psnr": 30.0})
    assert is_done(path, settings) and read_settings(path) == settings
    assert not is_done(path, settings | {"rate": 2e-3})
