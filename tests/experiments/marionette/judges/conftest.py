"""Settings of a judge's training in its smallest form."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> dict[str, Any]:
    """Of experiments.marionette.judges.classifier: 8 images, 3 steps, everything below a folder of the test's own."""
    sizes = {"images": 8, "held_out": 3, "steps": 3, "batch_size": 8, "learning_rate": 2e-3, "widths": [8, 8, 8]}
    places = {"output": str(tmp_path / "judge"), "folder": str(tmp_path / "run"), "cache": str(tmp_path / "cache")}
    return {"backbone": str(root / "rg/models/marionette"), "device": "cpu", "seed": 1, **places, **sizes}
