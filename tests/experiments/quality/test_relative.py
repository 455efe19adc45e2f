"""What the tables of relative heads count, by hand."""

import pytest
import torch

from experiments.quality.relative import RawFeatures, correspondence_scores, summarise


def test_raw_features_stand_side_by_side_at_the_size_of_the_readout():
    raw = RawFeatures(tap_channels=[3, 2], time_embed_dim=4, projection_dim=8, norm_groups=2, output_scale=2)
    features = [torch.rand(1, 3, 2, 2), torch.rand(1, 2, 4, 4)]
    maps = raw(features, None)
    assert maps.shape == (1, 5, 8, 8)
    torch.testing.assert_close(maps[0, :3].mean((1, 2)), features[0][0].mean((1, 2)))
    torch.testing.assert_close(maps[0, 3, 0, 0], features[1][0, 0, 0, 0])


def test_turned_heads_are_scored_apart():
    first = torch.eye(8).view(1, 8, 2, 4)
    maps = torch.stack([first, first.roll(1, -1)], 1).expand(3, -1, -1, -1, -1)
    right, wrong = [[[1.5, 1.5, 1], [5.5, 1.5, 1]]], [[[1.5, 1.5, 1], [9.5, 1.5, 1]]]
    far = [[[5.5, 5.5, 1], [9.5, 5.5, 1]]]
    points = torch.tensor([right + far, wrong + far, right + far])
    batch = {"points": points, "image": torch.zeros(3, 2, 3, 8, 16), "turn": torch.tensor([25.0, 30.0, float("nan")])}
    scores = correspondence_scores(maps, batch)
    assert scores["PCK@0.1"].tolist() == [1.0, 0.5, 1.0]
    numbers = summarise(scores)
    assert numbers == pytest.approx({"PCK@0.1": 5 / 6, "PCK@0.1, head turned by 20°": 0.75})


def test_accuracies_and_equal_error_rates():
    near, far = torch.tensor([0.1, 0.2, 0.3, 0.6]), torch.tensor([0.5, 0.7, 0.8, 0.9])
    numbers = summarise({"positive": near, "apart": far + 0.2, "mixed": far})
    assert numbers["accuracy, apart"] == 1 and numbers["equal error rate, apart"] == 0
    # Told apart at 0.55, one of four is wrong on either side.
    assert numbers["accuracy, mixed"] == 1 and numbers["equal error rate, mixed"] == pytest.approx(0.25)
    unknown = summarise({"positive": near, "mixed": far.where(torch.arange(4) < 3, torch.nan)})
    assert unknown["accuracy, mixed"] == 1
