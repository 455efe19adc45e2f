import math

import pytest
import torch

from data_prep.annotators.rendered import ExactPose
from data_prep.marionette.render import render
from rg.heads.spatial import SHARPNESS, SpatialHead, balanced_mean, misplacement
from rg.points import COLORS, draw_skeletons

IMAGE, READOUT = (64, 64), (32, 32)
SIZES = {"image_size": IMAGE, "readout_size": READOUT}


def make_head(**hyperparameters):
    torch.manual_seed(0)
    widths = {"tap_channels": [8], "time_embed_dim": 6, "projection_dim": 16, "norm_groups": 2, "hidden_channels": 8}
    return SpatialHead(**{**widths, **hyperparameters})


def scattered(count, *, people=1, seed=0):
    """Poses visible all over, 6 pixels from the border, no two joints of a person nearer than 6 pixels."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(torch.arange(6), torch.arange(6), indexing="xy"), -1).view(36, 2) * 9 + 7.0
    shuffled = [grid[torch.randperm(36, generator=generator)[:18]] for _ in range(count * people)]
    points = torch.stack(shuffled).view(count, people, 18, 2)
    points = points + 3 * torch.rand(points.shape, generator=generator) - 1.5
    return torch.cat([points, torch.ones(count, people, 18, 1)], -1)


def gradient(loss, readout):
    return torch.autograd.grad(loss, readout)[0]


@pytest.mark.parametrize("name", ["pose", "depth"])
def test_energy_parity_with_the_authors(shared, name):
    case = torch.load(shared / "fixtures/operators.pt", weights_only=True)[f"guide_spatial_{name}"]
    low, high = case["control_range"]
    head = make_head(control_range=(low, high), sparse_energy=False)
    # The authors pick every second pixel of the control, ours averages it: that is theirs to say, not the energy's.
    target = case["control"][None, :, ::2, ::2]
    readout = case["obs"].permute(0, 3, 1, 2).clone().requires_grad_()
    span = case["latents_scale"][1] - case["latents_scale"][0]
    energy = head.energy(readout, target).sum() * (span / head.readout_span) ** 2
    torch.testing.assert_close(energy, case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient(energy, readout), case["grad"].permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4 * case["grad"].abs().max()
    )


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_loss_parity_with_the_authors(shared, name):
    cases = torch.load(shared / "fixtures/operators.pt", weights_only=True)
    case, target = cases[f"train_spatial_{name}"], cases["train_spatial_sparse"]["target"]
    readout = case["obs"].clone().requires_grad_()
    # The authors balance over the whole batch: it enters as one sample.
    loss = make_head().error(readout.flatten(0, 1)[None], target.flatten(0, 1)[None], sparse=name == "sparse").sum()
    torch.testing.assert_close(loss, case["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(loss, readout), case["grad"], rtol=1e-4, atol=1e-4 * case["grad"].abs().max())


def test_balanced_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0, 10.0], [1.0, 2.0, 3.0, 6.0], [1.0, 2.0, 3.0, 6.0]], requires_grad=True)
    foreground = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    means = balanced_mean(values, foreground)
    assert means.tolist() == [6.0, 3.0, 3.0]  # (2 + 10) / 2; all foreground; all background
    slopes = gradient(means.sum(), values)
    torch.testing.assert_close(slopes, torch.tensor([[1 / 6, 1 / 6, 1 / 6, 1 / 2], [0.25] * 4, [0.25] * 4]))


def test_balanced_mean_with_even_halves_is_the_mean():
    values = torch.rand(3, 4, 5)
    foreground = torch.zeros(3, 4, 5, dtype=torch.bool)
    foreground[:, :2] = True
    torch.testing.assert_close(balanced_mean(values, foreground), values.mean((1, 2)))


def test_loss_is_the_mean_of_samples_not_of_elements():
    head = make_head()
    batch = {"keypoints": scattered(2), "label": 2 * draw_skeletons(scattered(2), IMAGE, IMAGE, 2.0) - 1}
    batch["label"][1] = -1  # an image without a person
    readout = torch.rand(2, 3, *READOUT) - 0.5
    each = [head.loss(readout[i : i + 1], {k: v[i : i + 1] for k, v in batch.items()}) for i in range(2)]
    torch.testing.assert_close(head.loss(readout, batch), torch.stack(each).mean())


@pytest.mark.parametrize("control_range", [(-0.5, 0.5), (-1.0, 1.0)])
def test_images_become_targets_by_area(control_range):
    low, high = control_range
    image = torch.full((1, 3, *IMAGE), -1.0)
    image[:, :, 10:12, 20:21] = 1.0  # half of cell (5, 10)
    target = make_head(control_range=control_range).encode_target(image, **SIZES)
    assert target.shape == (1, 3, *READOUT)
    torch.testing.assert_close(target[:, :, 5, 10], torch.full((1, 3), (low + high) / 2))
    target[:, :, 5, 10] = low
    assert (target == low).all()  # exactly: the sparse loss compares


def test_keypoints_become_the_image_that_the_annotator_draws():
    stills = render([(0, 0, i) for i in range(3)], kinds={"two": 1.0})
    head = make_head(output_scale=2)
    labels = draw_skeletons(stills.keypoints, IMAGE, IMAGE, ExactPose().line_width) * 2 - 1
    torch.testing.assert_close(head.encode_target(stills.keypoints, **SIZES), head.encode_target(labels, **SIZES))


@pytest.mark.parametrize(
    ("variant", "shape", "message"),
    [
        ("rgb", (3, 64, 64), r"\(B,3,H,W\).*\(B,P,18,3\).* \(3, 64, 64\)"),
        ("rgb", (1, 3, 32, 64), r"\(B,3,64,64\).*\(1, 3, 32, 64\)"),
        ("rgb", (1, 1, 64, 64), r"\(B,3,64,64\).*\(1, 1, 64, 64\)"),
        ("rgb", (1, 1, 17, 3), r"\(B,3,64,64\).*\(1, 1, 17, 3\)"),
        ("keypoints", (1, 18, 3), r"\(B,P,18,3\).*\(1, 18, 3\)"),
        (
            "keypoints",
            (1, 3, 64, 64),
            r"variant=keypoints .*\(B,P,18,3\).*\(1, 3, 64, 64\)",
        ),
    ],
)
def test_a_control_that_does_not_fit_is_named(variant, shape, message):
    with pytest.raises(ValueError, match=f"control: .*{message}"):
        make_head(variant=variant).encode_target(torch.zeros(shape), **SIZES)


def test_unknown_variant_is_named():
    with pytest.raises(ValueError, match=r"variant: .*'rgb', 'keypoints'.*'edges'"):
        make_head(variant="edges")


def test_keypoints_of_an_encoded_target():
    head, poses = make_head(variant="keypoints"), scattered(16)
    found = head.keypoints(head.encode_target(poses, **SIZES), IMAGE)
    assert found.shape == (16, 18, 2)
    assert (found - poses[:, 0, :, :2]).norm(dim=-1).max() < 0.6


@pytest.mark.parametrize("control_range", [(-0.5, 0.5), (-1.0, 1.0)])
def test_keypoints_of_an_encoded_image(control_range):
    """Joints one at a time: limbs share their hues, and the areas of a readout cell mix what overlaps."""
    head, poses = make_head(control_range=control_range), scattered(18)
    poses[..., 2] = torch.eye(18)[:, None]
    found = head.keypoints(head.encode_target(poses, **SIZES), IMAGE)
    distance = (found - poses[:, 0, :, :2]).norm(dim=-1).diagonal()
    assert distance.median() < 0.6 and distance.max() < 1.5


@pytest.mark.parametrize("variant", ["rgb", "keypoints"])
def test_energy_of_a_sample_does_not_depend_on_its_neighbours(variant):
    head = make_head(variant=variant)
    target = head.encode_target(scattered(3, people=2), **SIZES)
    readout = torch.randn(target.shape, requires_grad=True)
    energy = head.energy(readout, target)
    assert energy.shape == (3,) and (energy > 0).all()
    alone = head.energy(readout[1:2], target[1:2])
    torch.testing.assert_close(energy[1:2], alone)
    torch.testing.assert_close(gradient(energy.sum(), readout)[1:2], gradient(alone.sum(), readout)[1:2])
    assert torch.equal(head.energy(target, target), torch.zeros(3))


@pytest.mark.parametrize("variant", ["rgb", "keypoints"])
def test_preview_is_an_image(variant):
    head, poses = make_head(variant=variant), scattered(2)
    wild = head.preview(torch.randn(2, 3 if variant == "rgb" else 18, *READOUT) * 5)
    assert wild.shape == (2, 3, *READOUT) and wild.min() >= 0 and wild.max() <= 1
    poses[..., :2] = (poses[..., :2] / 2).round() * 2 + 0.5  # a readout cell's centre
    shown = head.preview(head.encode_target(poses, **SIZES))
    x, y = (int((v - 0.5) / 2) for v in poses[0, 0, 4, :2])
    torch.testing.assert_close(shown[0, :, y, x], torch.tensor(COLORS[4]) / 255, atol=0.02, rtol=0)


@pytest.mark.parametrize("variant", ["rgb", "keypoints"])
def test_readout_and_its_range(variant):
    head = make_head(variant=variant, output_scale=2, control_range=(-1.0, 1.0))
    readout = head([torch.randn(2, 8, 4, 4)], torch.randn(2, 6))
    assert readout.shape == (2, 3 if variant == "rgb" else 18, 8, 8)
    assert head.readout_span == (2 if variant == "rgb" else 1)
    assert variant == "keypoints" or readout.abs().max() < 1  # tanh


def test_misplacement_is_the_cross_entropy_of_a_softmax_over_cells():
    target = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    target[0, 0, 0, 1] = 1.0  # the second keypoint is not drawn
    readout = torch.zeros(3, 2, 2, 2, dtype=torch.float64)
    readout[1, 0, 0, 1] = 1.0
    readout[2, 0, 1, 0] = 1.0
    right, wrong = math.exp(SHARPNESS), 1.0
    expected = [math.log(4), -math.log(right / (right + 3)), -math.log(wrong / (right + 3))]
    assert misplacement(readout, target).tolist() == pytest.approx(expected)
    assert misplacement(readout, torch.zeros_like(target)).tolist() == [0, 0, 0], "nothing drawn, nothing misplaced"


def test_contrast_adds_to_the_energy_alone():
    plain = make_head(variant="keypoints")
    contrasted = make_head(variant="keypoints", contrast=0.5)
    readout, target = torch.rand(2, 18, 8, 8), torch.rand(2, 18, 8, 8)
    added = contrasted.energy(readout, target) - plain.energy(readout, target)
    assert torch.allclose(added, 0.5 * misplacement(readout, target), atol=1e-6)
    image, wanted = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    energies = [make_head(variant="rgb", contrast=weight).energy(image, wanted) for weight in (0.0, 0.5)]
    assert torch.equal(*energies), "images have no bumps to misplace"
