import re

import pytest
import torch
import torch.nn.functional as F

from rg.heads.aggregation import AggregationNetwork
from rg.heads.spatial import SpatialHead

WIDTHS = {"time_embed_dim": 6, "projection_dim": 16, "norm_groups": 2}


def make_network(channels, *, output_scale=1, taps=None, seed=0):
    torch.manual_seed(seed)
    network = AggregationNetwork(tap_channels=channels, output_scale=output_scale, taps=taps, **WIDTHS)
    for parameter in network.parameters():  # norms too: a scale of 1 and a shift of 0 would hide a missing one
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def make_features(channels, sizes, batch=2):
    return [torch.randn(batch, c, s, s) for c, s in zip(channels, sizes, strict=True)]


def released_keys(weights):
    """Names of the authors' layout as ours; test-side on purpose, the importer has one of its own."""
    renamed = {}
    for name, tensor in weights.items():
        name = re.sub(r"bottleneck_layers\.(\d+)\.", r"aggregation.bottlenecks.\1.", name)
        name = re.sub(r"conv(\d)\.norm\.", r"norm\1.", name).replace("shortcut.norm.", "shortcut_norm.")
        name = name.replace("emb_layers.", "time.").replace("mixing_weights", "aggregation.mixing_weights")
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("time", ["emb", "noemb"])
@pytest.mark.parametrize("kind", ["spatial", "relative"])
def test_parity_with_the_authors_network(shared, kind, time):
    released = torch.load(shared / f"fixtures/tiny_{kind}.pt", weights_only=True)
    case = torch.load(shared / f"fixtures/tiny_{kind}_io.pt", weights_only=True)
    config = released["config"]
    head = SpatialHead(
        tap_channels=config["dims"],
        time_embed_dim=case["emb"].shape[1],
        projection_dim=config["projection_dim"],
        norm_groups=32,
    )
    loaded = head.load_state_dict(released_keys(released["aggregation_network"]), strict=False)
    assert not loaded.unexpected_keys
    # A relative head has no output convolutions; nothing else may be missing.
    assert {key.split(".")[0] for key in loaded.missing_keys} == ({"output_head"} if kind == "relative" else set())
    embedding = case["emb"] if time == "emb" else None
    with torch.no_grad():
        aggregate = head.aggregation(case["native"], embedding)
        torch.testing.assert_close(aggregate, case[f"agg_{time}"], atol=2e-5, rtol=0)
        output = head(case["native"], embedding) if kind == "spatial" else aggregate
        torch.testing.assert_close(output, case[f"out_{time}"], atol=2e-5, rtol=0)
    assert not torch.allclose(case["agg_emb"], case["agg_noemb"], atol=1e-2)


def test_convolutions_before_the_upsampling_change_nothing():
    channels, sizes = [12, 8, 16], [2, 4, 4]
    network, features = make_network(channels, output_scale=2), make_features(channels, sizes)
    embedding = torch.randn(2, 6)
    upsampled = [F.interpolate(f, (8, 8), mode="bilinear", align_corners=False) for f in features]
    expected = make_network(channels, output_scale=1)(upsampled, embedding)
    torch.testing.assert_close(network(features, embedding), expected, atol=1e-5, rtol=1e-5)


def test_taps_are_mixed_by_softmax():
    channels, sizes = [12, 8], [4, 4]
    network, features = make_network(channels), make_features(channels, sizes)
    parts = [net(f, None, (4, 4), torch.tensor(1.0)) for net, f in zip(network.bottlenecks, features, strict=True)]
    network.mixing_weights.data = torch.tensor([0.0, 3.0]).log()  # softmax: 0, 1
    torch.testing.assert_close(network(features, None), parts[1])
    network.mixing_weights.data = torch.tensor([1.0, 3.0]).log() + 5  # softmax: 1/4, 3/4, whatever is added
    torch.testing.assert_close(network(features, None), parts[0] / 4 + parts[1] * 3 / 4)
    assert (network(features, None) >= 0).all()


def test_only_the_chosen_taps_are_read():
    channels, sizes = [12, 8, 16], [2, 4, 4]
    network, features = make_network(channels, taps=[1], output_scale=2), make_features(channels, sizes)
    (net,) = network.bottlenecks
    expected = net(features[1], None, (8, 8), torch.tensor(1.0))
    torch.testing.assert_close(network(features, None), expected)
    blind = [features[0].fill_(torch.nan), features[1], features[2].fill_(torch.nan)]
    assert network(blind, None).isfinite().all()
    coarse = make_network(channels, taps=[0], output_scale=2)
    assert coarse(make_features(channels, sizes), None).shape == (2, 16, 8, 8)  # as all heads of this backbone


@pytest.mark.parametrize("taps", [[], [3], [-1], [0, 0]])
def test_other_numbers_than_those_of_taps_are_refused(taps):
    with pytest.raises(ValueError, match="taps: .*0 to 2.* got "):
        make_network([4, 4, 4], taps=taps)


def test_a_new_network_mixes_evenly():
    network = AggregationNetwork(tap_channels=[4, 4, 4], output_scale=1, **WIDTHS)
    assert torch.equal(network.mixing_weights.softmax(0), torch.full((3,), 1 / 3))


def test_shortcut_is_the_identity_where_widths_agree():
    network = make_network([16])
    assert not any("shortcut" in name for name in network.state_dict())
    network.bottlenecks[0].norm3.weight.data.zero_()  # the branch is silent: what is left is the shortcut
    network.bottlenecks[0].norm3.bias.data.zero_()
    (feature,) = make_features([16], [4])
    assert torch.equal(network([feature], None), F.relu(feature))
    assert any("shortcut" in name for name in make_network([12]).state_dict())


def test_output_has_the_finest_taps_size_times_the_scale():
    channels, sizes = [12, 8], [2, 5]
    for scale in (1, 2, 3):
        output = make_network(channels, output_scale=scale)(make_features(channels, sizes), None)
        assert output.shape == (2, 16, 5 * scale, 5 * scale)


def test_time_embedding_is_heard_per_sample():
    channels, sizes = [12, 8], [2, 4]
    network, features = make_network(channels), make_features(channels, sizes)
    first, second = torch.randn(2, 6), torch.randn(2, 6)
    second[0] = first[0]
    before, after = network(features, first), network(features, second)
    torch.testing.assert_close(before[0], after[0])
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    assert not torch.allclose(network(features, None), before, atol=1e-3)


def test_another_number_of_taps_is_an_error():
    with pytest.raises(ValueError, match="features: .*2 .* 3"):
        make_network([12, 8])(make_features([12, 8, 8], [2, 4, 4]), None)
