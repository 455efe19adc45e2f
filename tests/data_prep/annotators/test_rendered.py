from pathlib import Path

import pytest
import torch

from data_prep.annotators.rendered import ExactDepth, ExactEdges, ExactPose
from data_prep.marionette.render import render
from data_prep.records import Skip, SourceSample
from data_prep.sources.marionette import MarionetteSource
from rg.heads.spatial import SpatialHead


@pytest.fixture(scope="module")
def samples():
    return MarionetteSource(seed=1).read("val", range(6))


@pytest.fixture(scope="module")
def stills():
    return render([(1, 1, index) for index in range(6)])


def blank(**known):
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    return SourceSample(image, "", "one", seed=(0, 1, 7), keypoints=torch.zeros(0, 18, 3), **known)


def test_depth_is_inverse_depth_over_its_largest(samples, stills):
    for label, depth, sample in zip(ExactDepth().annotate(samples), stills.depth, samples, strict=True):
        assert label.image.shape == (3, 64, 64) and label.image.dtype == torch.uint8
        assert (label.image == label.image[0]).all() and label.image.max() == 255
        torch.testing.assert_close(label.image[0] / 255, depth / depth.max(), rtol=0, atol=0.5 / 255 + 1e-6)
        assert torch.equal(label.keypoints, sample.keypoints)


def test_people_are_nearer_than_the_sky(samples, stills):
    for label, people, depth in zip(ExactDepth().annotate(samples), stills.instances > 0, stills.depth, strict=True):
        assert (label.image[0][depth == 0] == 0).all() and (depth == 0).any()
        assert label.image[0][people].float().mean() > 2 * label.image[0][~people].float().mean()


def test_grey_levels_keep_the_ratios_of_depths():
    near, far = blank(depth=torch.full((8, 8), 0.2)), blank(depth=torch.full((8, 8), 0.2))
    near.depth[0, 0], far.depth[0, 0] = 0.8, 0.4  # no sky: the farthest thing is not infinitely far
    levels = [label.image[0, 4, 4].item() for label in ExactDepth().annotate([near, far])]
    assert levels == [round(255 / 4), round(255 / 2)]


def test_edges_are_the_renderers(samples, stills):
    for label, edges, sample in zip(ExactEdges(line_width=1).annotate(samples), stills.edges, samples, strict=True):
        assert torch.equal(label.image, (edges * 255).byte().expand(3, -1, -1))
        assert torch.equal(label.keypoints, sample.keypoints)


@pytest.mark.parametrize(("width", "covered"), [(1, range(3, 4)), (2, range(3, 5)), (3, range(2, 5))])
def test_lines_have_their_width(width, covered):
    sample = blank(edges=torch.zeros(8, 8, dtype=torch.bool))
    sample.edges[3] = True
    (label,) = ExactEdges(line_width=width).annotate([sample])
    expected = torch.zeros(3, 8, 8, dtype=torch.uint8)
    expected[:, list(covered)] = 255
    assert torch.equal(label.image, expected)


def test_background_of_edges_stays_exactly_black_in_the_readouts_target(samples):
    labels = torch.stack([label.image for label in ExactEdges().annotate(samples)])
    head = SpatialHead(tap_channels=[8], time_embed_dim=6)
    target = head.encode_target(labels / 127.5 - 1, readout_size=(32, 32), image_size=(64, 64))
    empty = torch.nn.functional.max_pool2d(labels.float(), 2) == 0
    assert 0.3 < empty.float().mean() < 0.95
    assert (target[empty] == -0.5).all() and (target[~empty] > -0.5).all()


@pytest.mark.parametrize(
    ("annotator", "name", "value", "reason"),
    [
        (ExactDepth(), "depth", torch.zeros(8, 8), "nothing in it has a depth"),
        (ExactEdges(), "edges", torch.zeros(8, 8, dtype=torch.bool), "no edge was found"),
    ],
)
def test_an_image_without_a_label_is_named(annotator, name, value, reason):
    (skip,) = annotator.annotate([blank(**{name: value})])
    assert skip == Skip(f"the image of seed (0, 1, 7) has no label: {reason}")


@pytest.mark.parametrize(
    ("annotator", "name"), [(ExactPose(), "keypoints"), (ExactDepth(), "depth"), (ExactEdges(), "edges")]
)
def test_images_that_were_read_have_no_exact_labels(annotator, name):
    read = SourceSample(torch.zeros(3, 8, 8, dtype=torch.uint8), "", "picture", file=Path("a/b.png"), original=(8, 8))
    with pytest.raises(ValueError, match=f"annotator: .*renders.* a/b.png .*{name}"):
        annotator.annotate([read])
