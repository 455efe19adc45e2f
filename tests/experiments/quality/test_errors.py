import json
from pathlib import Path

import pytest

from data_prep.prepare import build
from experiments.quality.errors import errors
from rg.data.shards import read_shards
from rg.points import KEYPOINTS, MIRROR


def test_swapped_sides_are_told_from_other_errors(tmp_path: Path):
    recipe = {
        "source": {"_target_": "data_prep.sources.marionette.MarionetteSource", "kinds": {"one": 1.0}},
        "annotator": {"_target_": "data_prep.annotators.rendered.ExactPose"},
        "backbone": {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": "marionette"},
    }
    build(root=str(tmp_path / "data"), shard_size=2, split="test", n=2, **recipe)
    settings = {"data": {"root": str(tmp_path / "data")}, "split": "test", "images": 2, "alphas": [0.1]}
    settings["world"] = {"judges": ["one", "other"]}
    (tmp_path / "settings.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "samples").mkdir()
    keypoints = read_shards(tmp_path / "data" / "test", 2).keypoints[:, 0, :, :2]
    # The first image is right, the second one right but for its sides.
    for number, points in enumerate([keypoints[0], keypoints[1, list(MIRROR)]]):
        scores = {"pck": {box: {"0.1": 0.5} for box in ("target", "predicted")}, "confidence": 0.5, "present": True}
        right, wrong = (scores | {"oks": 0.5, "points": [p.tolist()]} for p in (points, points + 1000))
        record = {"position": number, "prompt": "", "seconds": {"unguided": 1.0, "guided": 1.0}}
        conditions = ("unguided", "guided", "ceiling")
        record["judges"] = {"one": dict.fromkeys(conditions, right), "other": dict.fromkeys(conditions, wrong)}
        record["agreement"] = {"other": {key: {"same": {"0.1": 0.0}, "distance": None} for key in conditions}}
        (tmp_path / "samples" / f"{number:05d}.json").write_text(json.dumps(record))
    path = tmp_path / "samples" / "00001.json"
    whole = path.read_text()
    path.write_text(whole.replace('"position": 1', '"position": 0'))
    with pytest.raises(ValueError, match=rf"^{path}: .*\(1, .*\(0, "):
        errors(tmp_path)
    path.write_text(whole)
    text, other = errors(tmp_path, alpha=0.01).split("## other")
    assert "100.0% of the visible keypoints are wrong; 0% of these" in other
    assert "100% of these would be right with left and right swapped" in text
    assert "50% of the people have 90 % of their keypoints right" in text
    assert all(name.replace("_", " ") in text for name in KEYPOINTS)
