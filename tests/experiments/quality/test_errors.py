import json
from pathlib import Path

from data_prep.prepare import build
from experiments.quality.errors import errors
from rg.data.shards import read_shards
from rg.detectors.keypoints import MIRROR
from rg.points import KEYPOINTS


def test_swapped_sides_are_told_from_other_errors(tmp_path: Path):
    recipe = {
        "source": {"_target_": "data_prep.sources.marionette.MarionetteSource", "kinds": {"one": 1.0}},
        "annotator": {"_target_": "data_prep.annotators.rendered.ExactPose"},
        "backbone": {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": "marionette"},
    }
    build(root=str(tmp_path / "data"), shard_size=2, split="test", n=2, **recipe)
    settings = {"data": {"root": str(tmp_path / "data")}, "split": "test"}
    (tmp_path / "settings.json").write_text(json.dumps({"settings": settings}))
    (tmp_path / "samples").mkdir()
    keypoints = read_shards(tmp_path / "data" / "test", 2).keypoints[:, 0, :, :2]
    # The first image is right, the second one right but for its sides.
    for number, points in enumerate([keypoints[0], keypoints[1, list(MIRROR)]]):
        record = {"guided": {"points": [points.tolist()]}}
        (tmp_path / "samples" / f"{number:05d}.json").write_text(json.dumps(record))
    text = errors(tmp_path, alpha=0.01)
    assert "100% of these would be right with left and right swapped" in text
    assert "50% of the people have 90 % of their keypoints right" in text
    assert all(name.replace("_", " ") in text for name in KEYPOINTS)
