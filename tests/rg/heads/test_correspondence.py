"""The training of correspondence heads: closed forms of the loss, and what nearest neighbours score."""

import math

import pytest
import torch
import torch.nn.functional as F

from rg.backbone.diffusion import DiffusionBackbone
from rg.heads.correspondence import CorrespondenceHead, nearest, pair_pck

WIDTHS = {"tap_channels": [16, 16, 8, 8], "time_embed_dim": 32, "projection_dim": 16, "norm_groups": 2}


def make_head(**hyperparameters):
    torch.manual_seed(0)
    return CorrespondenceHead(**{**WIDTHS, **hyperparameters})


def make_batch(points, size=(8, 16)):
    """points: pairs x points x 2 images x (x, y, visible), in images of `size`."""
    return {"points": torch.tensor(points, dtype=torch.float32), "image": torch.zeros(len(points), 2, 3, *size)}


def test_the_loss_is_the_mean_of_both_directions_of_the_full_matrix():
    """Against the whole matrix of cosines, written out as the paper has it."""
    head, readout = make_head(), torch.rand(2, 2, 16, 3, 4, generator=torch.Generator().manual_seed(1))
    # Images of 6x8 pixels, cells of 2x2; the last point of the first pair and the first of the second do not count.
    places = torch.tensor([[[[0, 0], [3, 2]], [[1, 2], [2, 1]], [[0, 1], [0, 0]]]]).repeat(2, 1, 1, 1)
    seen = torch.tensor([[[1, 1], [1, 1], [1, 0]], [[0, 1], [1, 1], [1, 1]]])
    points = torch.cat([places * 2.0 + 0.5, seen[..., None]], -1)
    loss = head.loss(readout, {"points": points, "image": torch.zeros(2, 2, 3, 6, 8)})
    expected = 0.0
    for pair in range(2):
        a, b = (F.normalize(readout[pair, i].flatten(1), dim=0) for i in (0, 1))
        logits, terms = a.T @ b / 0.07, []
        for (first, second), visible in zip(places[pair], seen[pair], strict=True):
            if visible.all():
                i, j = (int(cell[1]) * 4 + int(cell[0]) for cell in (first, second))
                terms += [-logits[i].log_softmax(0)[j], -logits[:, j].log_softmax(0)[i]]
        expected += sum(terms) / len(terms) / 2
    torch.testing.assert_close(loss, torch.as_tensor(expected))


def test_the_loss_of_equal_vectors_is_that_of_a_guess():
    loss = make_head().loss(torch.ones(1, 2, 16, 4, 8), make_batch([[[[3, 3, 1], [5, 5, 1]]]]))
    torch.testing.assert_close(loss, torch.tensor(math.log(32)))


def test_a_pair_without_a_shared_point_adds_nothing():
    head, readout = make_head(), torch.rand(2, 2, 16, 4, 8)
    shared, none = [[[3, 3, 1], [5, 5, 1]]], [[[3, 3, 1], [5, 5, 0]]]
    both = head.loss(readout, make_batch([shared, none]))
    torch.testing.assert_close(both, head.loss(readout[:1], make_batch([shared])) / 2)


def test_nearest_neighbours_by_hand():
    """Images of 8x16 pixels on maps of 2x4 cells; the second map is the first moved one cell to the right."""
    first = torch.eye(8).view(1, 8, 2, 4)
    second = first.roll(1, -1)
    points = torch.tensor([[[1.5, 1.5], [6.0, 7.0]]])
    assert nearest(first, second, points, (8, 16)).tolist() == [[[5.5, 1.5], [9.5, 5.5]]]


def test_pck_counts_what_both_images_show():
    first = torch.eye(8).view(1, 8, 2, 4)
    # Three shared points, whose box in the second image is 8 wide: 0.1 of it is 0.8 pixels. The fourth is hidden.
    points = [[[1.5, 1.5, 1], [5.5, 1.5, 1]], [[5.5, 1.5, 1], [9.5, 2.2, 1]], [[1.5, 5.5, 1], [1.5, 5.5, 1]]]
    batch = make_batch([[*points, [[9.5, 1.5, 1], [13.5, 1.5, 0]]]])
    half, whole = pair_pck(first, first.roll(1, -1), batch)
    assert half.tolist() == pytest.approx([1 / 3]) and whole.tolist() == pytest.approx([2 / 3])


def test_a_pair_of_one_shared_point_has_no_size_and_no_score():
    one = [[[1.5, 1.5, 1], [5.5, 1.5, 1]], [[5.5, 1.5, 1], [9.5, 2.2, 0]]]
    two = [[[1.5, 1.5, 1], [5.5, 1.5, 1]], [[5.5, 1.5, 1], [9.5, 1.5, 1]]]
    first = torch.eye(8).view(1, 8, 2, 4).repeat(2, 1, 1, 1)
    half, whole = pair_pck(first, first.roll(1, -1), make_batch([[*one], [*two]]))
    assert half.isnan().tolist() == whole.isnan().tolist() == [True, False] and whole[1] == 1


def test_other_groups_than_pairs_are_refused():
    for readout in (torch.rand(2, 16, 4, 8), torch.rand(2, 3, 16, 4, 8)):
        with pytest.raises(ValueError, match=r"\(B,2,C,H,W\).*pairs.*\(2, .*data=correspondence"):
            make_head().loss(readout, make_batch([[[[3, 3, 1], [5, 5, 1]]]] * 2))


def test_temperature_is_positive():
    with pytest.raises(ValueError, match="temperature: .* 0.* 0"):
        make_head(temperature=0)


@pytest.fixture
def trained(tiny_pipeline):
    head = make_head().attach_backbone(DiffusionBackbone(tiny_pipeline()))
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 4, 8, 8)
    batch = {
        "latent_mean": torch.randn(shape, generator=generator),
        "latent_std": torch.full(shape, 0.1),
        "index": torch.arange(3),
        "epoch": torch.zeros(3, dtype=torch.int64),
    }
    return head, batch


def test_images_of_a_pair_share_the_time_and_not_the_noise(trained):
    head, batch = trained
    _, noise, timesteps = head.sample_noise(batch)
    assert timesteps.shape == (3,) and len(set(timesteps.tolist())) == 3
    assert noise.shape == (3, 2, 4, 8, 8)
    assert (noise[:, 0] - noise[:, 1]).abs().mean() > 0.5
    alone = head.sample_noise({name: value[1:2] for name, value in batch.items()})
    assert torch.equal(alone[1][0], noise[1]) and alone[2][0] == timesteps[1]


def test_groups_are_read_as_their_images_are_alone(trained):
    head, batch = trained
    latents, noise, timesteps = head.sample_noise(batch)
    readouts = head.readout(latents, noise, timesteps)
    assert readouts.shape == (3, 2, 16, 8, 8)
    torch.testing.assert_close(readouts[2, 1], head.readout(latents[2:, 1], noise[2:, 1], timesteps[2:])[0])


def test_equal_vectors_have_equal_colours_in_all_images():
    head, readout = make_head(), torch.rand(2, 2, 16, 4, 8)
    readout[1, 1, :, 0] = readout[0, 0, :, 2]
    colours = head.preview(readout)
    assert colours.shape == (2, 2, 3, 4, 8) and colours.min() >= 0 and colours.max() <= 1
    torch.testing.assert_close(colours[1, 1, :, 0], colours[0, 0, :, 2])
    assert (colours.flatten(3).std(-1) > 0.01).all()
    assert head.preview(readout[0]).shape == (2, 3, 4, 8)
