from pathlib import Path

from experiments import demo


def test_the_demos_configurations_are_the_commands_own(tmp_path: Path, capsys):
    sampled = demo._compose("sample", ["+experiment=pose_control", "world=marionette"], tmp_path)
    trained = demo._compose("train", ["+experiment=pose_100", "world=marionette"], tmp_path)
    evaluated = demo._compose("evaluate", [f"head.path={tmp_path}", "images=3"], tmp_path)
    assert sampled.head.path == "pose_8k5" and sampled.guidance["update"] == "score"
    assert trained.data.size == 100 and trained.run_dir == str(tmp_path)
    assert evaluated.images == 3 and evaluated.head.path == str(tmp_path)
    assert "$ python -m rg.train +experiment=pose_100 world=marionette" in capsys.readouterr().out
