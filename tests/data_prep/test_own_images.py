"""Preparing images of one's own needs no renderer, see also tests/test_architecture.py."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CODE = """
import sys
from data_prep import prepare
from data_prep.annotators.edges import Canny
from data_prep.annotators.files import FileLabels
from data_prep.sources.folders import FolderSource

source = FolderSource(path="images", resolution=32, validation_share=0.0, test_share=0.0)
samples = source.read("train", range(source.count("train")))
assert len(samples) == 2
for annotator in (Canny(), FileLabels(path="labels")):
    labels = annotator.annotate(samples)
    assert all(label.image.shape == (3, 32, 32) for label in labels), labels
print([name for name in sys.modules if name.startswith("data_prep.marionette")])
"""


@pytest.mark.slow
def test_images_of_ones_own_load_no_module_of_the_renderer(tmp_path: Path, root: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            array = np.random.default_rng(number).integers(256, size=(32, 40, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / folder / f"{number}.png")
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr
