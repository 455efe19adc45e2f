"""Variations on the embedded model: how poses differ, by hand, and that strength 0 changes nothing."""

import pytest
import torch

from experiments.applications.variations import pose_diversity, run
from rg.cli import compose_config


def test_diversity_is_the_mean_distance_of_two_of_the_images():
    points = torch.zeros(3, 2, 4, 2)
    points[1, 0, :, 0] = 3.0  # of the first reference one image is 3 pixels to the right of both others
    assert pose_diversity(points).tolist() == [2.0, 0.0]


def test_one_round_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rounds: expected at least 2, got 1"):
        run(compose_config("experiments/variations", ["rounds=1"]), tmp_path, "")


@pytest.mark.slow
def test_strength_zero_is_unguided_and_another_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["images=2", "rounds=2", "+sampling.num_inference_steps=6", "split=search", "~methods.weak"]
    words += ["~methods.strong", "methods.medium.guidance.readout_scale=0.0"]
    text = run(compose_config("experiments/variations", words), tmp_path / "run", "command")
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in text.splitlines()[2:]}
    assert rows["medium"][0].endswith("(+0.00 to +0.00)") and rows["medium"][2] == rows["unguided"][2]
    assert rows["default"][2] != rows["unguided"][2]
