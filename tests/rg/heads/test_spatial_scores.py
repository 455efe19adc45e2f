import pytest
import torch

from data_prep.annotators.rendered import ExactDepth, ExactEdges, ExactPose
from data_prep.sources.marionette import MarionetteSource
from rg.heads.spatial import SCORES, SpatialHead

ANNOTATORS = {"pose": ExactPose, "depth": ExactDepth, "edges": ExactEdges}
RANGES = {"pose": (-0.5, 0.5), "depth": (-1.0, 1.0), "edges": (-0.5, 0.5)}


def make_head(scores, **hyperparameters):
    widths = {"tap_channels": [8], "time_embed_dim": 6, "projection_dim": 16, "norm_groups": 2, "hidden_channels": 8}
    return SpatialHead(**widths, scores=scores, control_range=RANGES[scores], val_timesteps=[50], **hyperparameters)


def make_batch(scores, count=4, kinds=("one",)):
    samples = MarionetteSource(kinds={kind: 1 / len(kinds) for kind in kinds}).read("val", range(count))
    labels = ANNOTATORS[scores]().annotate(samples)
    people = torch.zeros(count, 2, 18, 3)
    for row, label in enumerate(labels):
        people[row, : len(label.keypoints)] = label.keypoints
    return {"label": torch.stack([label.image for label in labels]) / 127.5 - 1, "keypoints": people}


def score(head, readout, batch):
    head.metrics(readout, batch, 50)
    return {name: value["mean"] for name, value in head.val_scores["50"].compute().items()}


def perfect(head, batch):
    return head.encode_target(head.control(batch), readout_size=(32, 32), image_size=(64, 64))


@pytest.mark.parametrize(
    ("scores", "at_least"), [("pose", {0.1: 0.5}), ("depth", {"delta1.25": 0.9}), ("edges", {"f@1px": 0.93})]
)
def test_a_perfect_readout_scores_well_and_another_images_badly(scores, at_least):
    head, batch = make_head(scores), make_batch(scores)
    good, bad = (
        score(head, perfect(head, batch), batch),
        score(make_head(scores), perfect(head, batch).roll(1, 0), batch),
    )
    for name, least in at_least.items():
        assert least < good[name] <= 1 and bad[name] < 0.8 * good[name], (good, bad)
    if scores == "depth":
        assert good["si_log"] < 0.5 * bad["si_log"]


def test_keypoints_are_scored_as_pose():
    head, batch = make_head("pose", variant="keypoints"), make_batch("pose")
    assert score(head, perfect(head, batch), batch)[0.05] > 0.9


def test_images_of_two_people_are_not_scored_as_pose():
    head, batch = make_head("pose"), make_batch("pose", kinds=("two",))
    head.metrics(perfect(head, batch), batch, 50)
    assert not head.val_scores["50"].update_called


@pytest.mark.parametrize(("scores", "variant"), [("edge", "rgb"), ("depth", "keypoints")])
def test_unknown_scores_are_named(scores, variant):
    known = list(SCORES) if variant == "rgb" else ["pose"]
    words = f"scores: .*{known} .*variant={variant}.*'{scores}'".replace("[", r"\[")
    with pytest.raises(ValueError, match=words):
        SpatialHead(tap_channels=[8], time_embed_dim=6, scores=scores, variant=variant)
