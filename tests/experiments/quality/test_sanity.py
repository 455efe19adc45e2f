from pathlib import Path

import pytest
import torch

from experiments.quality.sanity import Checks
from rg.cli import compose_config

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_four_images_of_one_batch_go_each_to_its_own_target_under_euler():
    result = Checks(compose_config("sanity", []), 4).own_target()
    assert set(result["judges"]) == {"hourglass", "transformer"}
    for found in result["judges"].values():
        assert found["all_own"], result
        distance = torch.tensor(found["distance"])
        own, others = distance.diagonal(), distance[~torch.eye(4, dtype=torch.bool)]
        assert own.mean() < 0.5 * others.mean(), distance


def test_a_head_that_was_never_trained_does_not_help():
    result = Checks(compose_config("sanity", ["sampling.num_inference_steps=10"]), 8).random_head()
    assert all(gain["low"] < 0.05 for gain in result["gain"].values()), result
