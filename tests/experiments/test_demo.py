from pathlib import Path

import pytest
from hydra.errors import HydraException

from experiments.demo import compose_step, demo
from rg.cli import compose_config


def test_the_steps_are_the_commands_own_in_the_demos_folders(tmp_path: Path):
    words = ["world=sd15", "++world.backbone.path=my/finetuned", "pictures.path=my/images", "images=3"]
    cfg = compose_config("demo", [*words, f"run_dir={tmp_path}", f"train.run_dir={tmp_path}/heads/new"])
    sampling, training = compose_step("sample", cfg, words), compose_step("train", cfg, words)
    assert sampling.head.path == "pose_8k5" and sampling.guidance["update"] == "score" and sampling.images == 4
    assert training.data.size == 100 and training.name == "pose_100"
    for step in (sampling, training, cfg):
        assert step.world.name == "sd15" and step.world.backbone.path == "my/finetuned"
        assert step.pictures.path == "my/images"
    assert (sampling.run_dir, training.run_dir) == (f"{tmp_path}/image", f"{tmp_path}/heads/new")
    assert cfg.images == 3 and cfg.head.path == f"{training.run_dir}/head" and cfg.run_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("images=0", ["images", "0"]),
        ("alphas=[0.1,2.0]", ["alphas", "2.0"]),
        ("scheduler=eular", ["scheduler", "euler", "'eular'"]),
        ("world.detectors.hourglass.folder=nowhere", ["nowhere"]),
        ("train.experiment=poze_100", ["poze_100"]),
    ],
)
def test_what_the_last_step_would_refuse_is_refused_before_the_first(tmp_path: Path, word: str, parts: list[str]):
    cfg = compose_config("demo", [word, f"run_dir={tmp_path}"])
    with pytest.raises((ValueError, HydraException)) as caught:
        demo(cfg, [word])
    text = f"{caught.value} {caught.value.__cause__}"
    assert not [part for part in parts if part not in text], text
    assert not list(tmp_path.iterdir())
