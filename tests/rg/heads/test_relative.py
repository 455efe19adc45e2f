import pytest
import torch

from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import pick
from rg.points import box_cells, cells

KINDS = [AppearanceHead, CorrespondenceHead]
WIDTHS = {"tap_channels": [8, 4], "time_embed_dim": 6, "projection_dim": 16, "norm_groups": 2}


def make_head(kind, **hyperparameters):
    torch.manual_seed(0)
    return kind(**{**WIDTHS, **hyperparameters})


def vectors(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.05


def boxes(*given):
    return torch.tensor([given])


@pytest.mark.parametrize("kind", KINDS)
def test_the_aggregate_is_the_readout(kind):
    head = make_head(kind)
    features, embedding = [torch.randn(2, 8, 3, 4), torch.randn(2, 4, 6, 8)], torch.randn(2, 6)
    readout = head(features, embedding)
    assert readout.shape == (2, 16, 6, 8) and readout.min() >= 0
    assert torch.equal(readout, head.aggregation(features, embedding))
    assert {name.split(".")[0] for name in head.state_dict()} == {"aggregation"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_cannot_be_the_target(kind, tiny_pipeline, denoise):
    pipe = tiny_pipeline()
    head = make_head(kind, tap_channels=[16, 16, 8, 8], time_embed_dim=32)
    guidance = ReadoutGuidance([GuidanceTerm(head, FixedTarget(torch.zeros(1, 3, 32, 32)))])
    words = rf"control: {kind.__name__} .*reference image.* \(1, 3, 32, 32\)"
    with pytest.raises(ValueError, match=words):
        denoise(pipe, guidance)


def test_pick_takes_columns_and_rows():
    maps = torch.arange(24.0).view(1, 2, 3, 4).repeat(2, 1, 1, 1)
    maps[1] += 100
    points = torch.tensor([[[1, 2], [3, 0], [-1, 9]]])
    picked = pick(maps, points)
    assert picked[0].tolist() == [[9, 21], [3, 15], [8, 20]]
    assert torch.equal(picked[1], picked[0] + 100)
    each = torch.stack([points[0], points[0].flip(0)])
    assert torch.equal(pick(maps, each)[1], picked[1].flip(0))


def test_points_and_boxes_in_cells():
    # An image of 8x16 pixels on a map of 2x4 cells, four pixels each.
    points = torch.tensor([[-0.5, 0.0], [3.4, 3.6], [3.6, 7.4], [15.4, 7.5], [-0.6, -3.0]])
    assert cells(points, (8, 16), (2, 4)).tolist() == [[0, 0], [0, 1], [1, 1], [3, 2], [-1, -1]]
    touched = box_cells(torch.tensor([[0, 0, 16, 8], [4, 4, 8, 8], [3, 1, 5, 2]]), (8, 16), (2, 4))
    assert touched.tolist() == [[0, 0, 4, 2], [1, 1, 2, 2], [0, 0, 2, 1]]


def test_appearance_energy_by_hand():
    head, readout = make_head(AppearanceHead), torch.zeros(2, 16, 1, 2)
    target = torch.zeros(1, 16, 1, 2)
    target[:, 0] = 1.0
    readout[0, 0] = 5.0  # the same direction
    readout[1, 0, 0, 0], readout[1, 1, 0, 1] = 1.0, 1.0  # the same, and a right angle
    assert head.energy(readout, target).tolist() == [0.0, 0.5]
    inside = head.energy(readout, target, boxes=(boxes(0, 0, 1, 1), boxes(1, 0, 2, 1)))
    assert inside.tolist() == [0.0, 1.0]


def test_each_image_has_its_box():
    head, readout, target = make_head(AppearanceHead), vectors(2, 16, 6, 8), vectors(1, 16, 6, 8, seed=1)
    own = torch.tensor([[0, 0, 4, 6], [3, 2, 8, 5]])
    together = head.energy(readout, target, boxes=(boxes(1, 1, 5, 5), own))
    for i in range(2):
        alone = head.energy(readout[i : i + 1], target, boxes=(boxes(1, 1, 5, 5), own[i : i + 1]))
        torch.testing.assert_close(alone[0], together[i])
    whole = boxes(0, 0, 8, 6)
    torch.testing.assert_close(head.energy(readout, target, boxes=(whole, whole)), head.energy(readout, target))


@pytest.mark.parametrize("box", [(3, 0, 3, 6), (0, 2, 8, 1), (-1, 0, 4, 4), (0, 0, 9, 6), (0, 0, 8, 7)])
def test_boxes_outside_the_map_are_named(box):
    head, maps, good = make_head(AppearanceHead), vectors(1, 16, 6, 8), boxes(0, 0, 8, 6)
    for pair in ((good, boxes(*box)), (boxes(*box), good)):
        with pytest.raises(ValueError, match=r"boxes: .*right <= 8 .*bottom <= 6.* \[") as error:
            head.energy(maps, maps, boxes=pair)
        assert str(list(box)) in str(error.value)


@pytest.mark.parametrize("repulsion", [0.0, 0.5, 0.25])
def test_correspondence_energy_by_hand(repulsion):
    head, readout = make_head(CorrespondenceHead, repulsion=repulsion), torch.zeros(1, 16, 2, 2)
    readout[0, 0, 0, 0], readout[0, 1, 0, 1] = 3.0, 2.0
    target = torch.zeros(1, 1, 16)
    target[..., 0] = 7.0  # what the reference shows at the source point: still there in the readout
    source, destination = torch.tensor([[[0, 0]]]), torch.tensor([[[1, 0]]])
    energy = head.energy(readout, target, source=source, destination=destination)
    torch.testing.assert_close(energy, torch.tensor([(repulsion - 1) * 0.5 + repulsion * 1.0]))
    back = head.energy(readout, target, source=destination, destination=source)
    torch.testing.assert_close(back, torch.tensor([(repulsion - 1) * 1.0 + repulsion * 0.5]))


def test_pairs_that_leave_the_map_do_not_count():
    head, readout, target = make_head(CorrespondenceHead, repulsion=0.5), vectors(2, 16, 3, 4), vectors(1, 3, 16)
    source = torch.tensor([[[0, 0], [4, 1], [2, 2]]])
    destination = torch.tensor([[[1, 1], [0, 0], [2, -1]]])
    energy = head.energy(readout, target, source=source, destination=destination)
    first = head.energy(readout, target[:, :1], source=source[:, :1], destination=destination[:, :1])
    torch.testing.assert_close(energy, first)
    with pytest.raises(ValueError, match=r"points: .*one pair .*3x4 cells.*\[2, 2\].*\[2, -1\]"):
        head.energy(readout, target[:, 1:], source=source[:, 1:], destination=destination[:, 1:])


def test_repulsion_is_a_share():
    for repulsion in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"repulsion: .*0 <= .* < 1.* {repulsion}"):
            make_head(CorrespondenceHead, repulsion=repulsion)


def energies(dtype):
    """Each kind's energy as a function of readouts (2, 16, 3, 4)."""
    appearance, correspondence = make_head(AppearanceHead), make_head(CorrespondenceHead, repulsion=0.5)
    target, own = vectors(2, 16, 3, 4, seed=1, dtype=dtype), torch.tensor([[0, 0, 2, 3], [1, 1, 4, 3]])
    source, destination = torch.tensor([[[0, 0], [2, 1]]]), torch.tensor([[[3, 2], [2, 1]]])
    points = {"source": source, "destination": destination}
    return [
        lambda readout: appearance.energy(readout, target),
        lambda readout: appearance.energy(readout, target, boxes=(boxes(0, 1, 4, 3), own)),
        lambda readout: correspondence.energy(readout, pick(target, source), **points),
    ]


@pytest.mark.parametrize("number", range(3))
def test_gradient_of_the_energy(number):
    readout = vectors(2, 16, 3, 4, dtype=torch.float64).requires_grad_()
    energy = energies(torch.float64)[number]
    assert torch.autograd.gradcheck(energy, readout)
    (slope,) = torch.autograd.grad(energy(readout).sum(), readout)
    assert (energy((readout - 0.01 * slope / slope.norm()).detach()) < energy(readout)).all()


@pytest.mark.parametrize("number", range(3))
def test_a_readout_of_zeros_has_a_finite_gradient(number):
    readout = torch.zeros(2, 16, 3, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(energies(torch.float32)[number](readout).sum(), readout)
    assert slope.isfinite().all()


def parity(energy, obs, case):
    torch.testing.assert_close(energy, case["loss"], rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(energy, obs)
    torch.testing.assert_close(slope, case["grad"], rtol=1e-4, atol=1e-4 * case["grad"].abs().max())


@pytest.fixture
def cases(shared):
    return torch.load(shared / "fixtures/operators.pt", weights_only=True)


@pytest.mark.parametrize("name", ["guide_appearance", "guide_appearance_bbox"])
def test_appearance_parity_with_the_authors(cases, name):
    case = cases[name]
    obs, target = case["obs"].clone().requires_grad_(), case["gt"].permute(0, 3, 1, 2)
    pair = tuple(case["bbox"][:, None]) if "bbox" in case else None
    head = make_head(AppearanceHead)
    span = case["latents_scale"][1] - case["latents_scale"][0]
    energy = head.energy(obs.permute(0, 3, 1, 2), target, boxes=pair).sum() * (span / head.readout_span) ** 2
    parity(energy, obs, case)


def test_correspondence_parity_with_the_authors(cases):
    case = cases["guide_correspondence"]
    obs, target = case["obs"].clone().requires_grad_(), case["gt"].permute(0, 3, 1, 2)
    # Theirs count from the corner in (y, x), ours from the first pixel's centre in (x, y).
    source, destination = cells(case["points"].flip(-1) - 0.5, (12, 12), (12, 12))[:, None]
    head = make_head(CorrespondenceHead, repulsion=0.5)
    readout = obs.permute(0, 3, 1, 2)
    energy = head.energy(readout, pick(target, source), source=source, destination=destination).sum()
    parity(energy, obs, case)
