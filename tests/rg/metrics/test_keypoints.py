import importlib
import math
import re
import time
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rg.metrics.keypoints import PCK, box_side, box_sides, match_people, measurable, oks, pck
from rg.metrics.statistics import cmmd, kernel_distance, paired_gain, student_quantile
from rg.points import KEYPOINTS

# Two images, four keypoints; the boxes of the visible ones have sides 20 and 10.
TARGET = torch.tensor([[[0, 0], [20, 0], [0, 10], [90, 90]], [[5, 5], [15, 5], [5, 9], [15, 9]]]).float()
VISIBLE = torch.tensor([[True, True, True, False], [True, True, True, True]])
MOVED = torch.tensor([[[1, 0], [20, 2], [5, 10], [0, 0]], [[5, 5], [15, 6], [5, 11], [18, 9]]]).float()
# Distances: 1, 2, 5 of box 20; 0, 1, 2, 3 of box 10.
SHARES = {0.05: (1 / 3, 1 / 4), 0.1: (2 / 3, 2 / 4), 0.2: (2 / 3, 3 / 4)}

# COCO's keypoints in its order.
COCO_KEYPOINTS = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder"),
    *("left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip"),
    *("left_knee", "right_knee", "left_ankle", "right_ankle"),
)


def random_images(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """predicted, target, visible, present."""
    generator = torch.Generator().manual_seed(seed)
    target = 64 * torch.rand(n, 18, 2, generator=generator)
    predicted = target + 6 * torch.randn(n, 18, 2, generator=generator)
    visible = torch.rand(n, 18, generator=generator) < 0.7
    visible[:, 0] = True
    return predicted, target, visible, torch.rand(n, generator=generator) < 0.8


def test_box_side_takes_the_larger_side_of_visible_points() -> None:
    assert box_side(TARGET, VISIBLE).tolist() == [20, 10]
    assert box_side(TARGET, torch.zeros_like(VISIBLE)).tolist() == [0, 0]


def test_people_are_matched_by_smallest_total_distance() -> None:
    target = torch.tensor([0.0, 10, 30]).view(1, 3, 1, 1).expand(1, 3, 4, 2).clone()
    visible, present = torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    predicted = target[:, [2, 0, 1]]
    assert match_people(predicted, target, visible, present).tolist() == [[1, 2, 0]]
    # Both are nearest to the second person; the pair that is nearer in all decides, images by themselves.
    crossed = torch.tensor([[9.0, 12, 50], [12, 9, 50]]).view(2, 3, 1, 1).expand(2, 3, 4, 2)
    two = [x.expand(2, *x.shape[1:]) for x in (target, visible, present)]
    assert match_people(crossed, *two).tolist() == [[0, 1, 2], [1, 0, 2]]
    # Hidden keypoints do not count.
    far = predicted.clone()
    far[:, :, 0] += 1000
    visible[:, :, 0] = False
    assert match_people(far, target, visible, present).tolist() == [[1, 2, 0]]
    # Who is no person is given away last: to the one who is not asked for.
    visible[:, 0], present[:, 2] = False, False
    assert match_people(predicted, target, visible, present).tolist() == [[2, 1, 0]]


def random_crowds(images: int, people: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """predicted, target, visible, present, of which the target's first person may be nobody."""
    generator = torch.Generator().manual_seed(people)
    target = 64 * torch.rand(images, people, 18, 2, generator=generator)
    predicted = target[:, torch.randperm(people, generator=generator)]
    predicted = predicted + 9 * torch.randn(predicted.shape, generator=generator)
    visible = torch.rand(images, people, 18, generator=generator) < 0.7
    visible[::3, 0] = False
    return predicted, target, visible, torch.rand(images, people, generator=generator) < 0.8


@pytest.mark.parametrize("people", [1, 2, 3, 5])
def test_a_small_crowd_is_matched_as_the_best_of_all_orders_is(people: int) -> None:
    predicted, target, visible, present = random_crowds(40, people)
    distances = (predicted[:, None] - target[:, :, None]).norm(dim=-1) * visible[:, :, None]
    cost = distances.sum(-1) / visible.sum(-1).clamp_min(1)[..., None]
    cost = (cost + 1e6 * (visible.any(-1)[..., None] & ~present[:, None])).double()
    orders = list(permutations(range(people)))
    best = torch.stack([cost[:, range(people), order].sum(1) for order in orders], 1).argmin(1)
    assert torch.equal(match_people(predicted, target, visible, present), torch.tensor(orders)[best])


def test_a_large_crowd_is_matched_at_once() -> None:
    target = 64 * torch.rand(2, 100, 18, 2, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    visible, present = torch.ones(2, 100, 18, dtype=torch.bool), torch.ones(2, 100, dtype=torch.bool)
    begin = time.perf_counter()
    matched = match_people(target[:, order], target, visible, present)
    assert time.perf_counter() - begin < 1 and (order[matched] == torch.arange(100)).all()


def test_hidden_keypoints_that_are_nan_change_no_score() -> None:
    predicted, target, visible, present = random_crowds(4, 3)
    unknown = torch.where(visible[..., None], target, torch.nan)
    assert torch.equal(*(match_people(predicted, t, visible, present) for t in (target, unknown)))
    visible[..., 0] = True
    unknown = torch.where(visible[..., None], target, torch.nan)
    found = []
    for truth in (target, unknown):
        metric = PCK()
        metric.update(predicted[:, 0], truth[:, 0], visible[:, 0])
        found.append(metric.compute())
    assert found[0] == found[1]


def test_one_visible_keypoint_gives_no_size_to_measure_by() -> None:
    one, same = VISIBLE[:1] & (torch.arange(4) == 1), TARGET[:1] * 0
    assert measurable(TARGET, VISIBLE).tolist() == [True, True]
    assert measurable(TARGET[None, :1], one[None]).tolist() == [[False]]
    assert not measurable(same, VISIBLE[:1]).any() and not measurable(TARGET[:1], one & False).any()
    alone, mixed = PCK(alphas=tuple(SHARES)), PCK(alphas=tuple(SHARES))
    alone.update(MOVED[1:], TARGET[1:], VISIBLE[1:])
    mixed.update(MOVED, TARGET, torch.cat([one, VISIBLE[1:]]))
    assert mixed.compute() == alone.compute() and (int(alone.left_out), int(mixed.left_out)) == (0, 1)
    nobody = PCK(alphas=(0.1,))
    nobody.update(MOVED[:1], TARGET[:1], one)
    assert math.isnan(nobody.compute()[0.1]["mean"]) and int(nobody.left_out) == 1


@pytest.mark.parametrize("alpha", SHARES)
def test_pck_by_hand(alpha: float) -> None:
    torch.testing.assert_close(
        pck(MOVED, TARGET, VISIBLE, box_side(TARGET, VISIBLE), [alpha])[:, 0], torch.tensor(SHARES[alpha])
    )


def test_pck_at_several_alphas_is_that_at_each() -> None:
    side = box_side(TARGET, VISIBLE)
    together = pck(MOVED, TARGET, VISIBLE, side, list(SHARES))
    assert torch.equal(together, torch.cat([pck(MOVED, TARGET, VISIBLE, side, [alpha]) for alpha in SHARES], 1))


def test_pck_of_the_right_points_is_one_and_does_not_depend_on_the_unit() -> None:
    predicted, target, visible, _ = random_images(5)
    size = box_side(target, visible)
    assert pck(target, target, visible, size, [0.05]).tolist() == [[1]] * 5
    torch.testing.assert_close(
        pck(predicted, target, visible, size, [0.1]), pck(4 * predicted, 4 * target, visible, 4 * size, [0.1])
    )


@pytest.mark.parametrize("alpha", [0, 1, -0.1, 2, math.nan])
def test_alpha_outside_of_0_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=rf"alphas: .*\(0, 1\).*\[{alpha}\]"):
        pck(MOVED, TARGET, VISIBLE, torch.ones(2), [alpha])
    with pytest.raises(ValueError, match=rf"alphas: .*\(0, 1\).*\[0\.1, {alpha}\]"):
        PCK(alphas=(0.1, alpha))


def test_other_bad_input_is_refused() -> None:
    nothing = VISIBLE.clone()
    nothing[1] = False
    with pytest.raises(ValueError, match=r"visible keypoints.*none: \[1\]"):
        pck(MOVED, TARGET, nothing, torch.ones(2), [0.1])
    with pytest.raises(ValueError, match=r"predicted.*\(2, 4, 2\).*got .*\(2, 3, 2\)"):
        pck(MOVED[:, :3], TARGET, VISIBLE, torch.ones(2), [0.1])
    with pytest.raises(ValueError, match="'target' or 'predicted'.*'image'.*box"):
        PCK(box="image")
    with pytest.raises(ValueError, match="PCK of no images.*at least one"), pytest.warns(UserWarning):
        PCK().compute()


def test_metric_by_hand() -> None:
    metric = PCK(alphas=tuple(SHARES))
    for i in range(2):
        metric.update(MOVED[i : i + 1], TARGET[i : i + 1], VISIBLE[i : i + 1])
    for alpha, (a, b) in SHARES.items():
        # The standard error of two numbers is half of their difference.
        assert metric.compute()[alpha] == pytest.approx({"mean": (a + b) / 2, "sem": abs(a - b) / 2}, abs=1e-7)


def test_undetected_person_is_all_wrong() -> None:
    metric = PCK(alphas=(0.2,))
    metric.update(MOVED, TARGET, VISIBLE, present=torch.tensor([False, True]))
    assert metric.compute()[0.2]["mean"] == pytest.approx(SHARES[0.2][1] / 2)


def test_box_of_the_prediction() -> None:
    metric = PCK(alphas=(0.1,), box="predicted")
    metric.update(TARGET + 2.5 * (TARGET - TARGET[:, :1]), TARGET, VISIBLE)
    # Boxes of 70 and 35: of the distances 0, 50, 25 and 0, 25, 10, 27 one each is small enough.
    assert metric.compute()[0.1]["mean"] == pytest.approx((1 / 3 + 1 / 4) / 2)


def test_metric_starts_anew_after_reset() -> None:
    metric = PCK()
    metric.update(*random_images(3))
    metric.reset()
    metric.update(MOVED, TARGET, VISIBLE)
    assert metric.compute()[0.1]["mean"] == pytest.approx(sum(SHARES[0.1]) / 2)


def _score_a_share(rank: int, file: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = PCK()
    # Unequal shares: a mean of the two means would be wrong.
    metric.update(*(x[:2] if rank == 0 else x[2:] for x in random_images(7)))
    torch.save(metric.compute(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _score_a_share, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2, start_method="fork"
    )
    metric = PCK()
    metric.update(*random_images(7))
    for rank in range(2):
        scores = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for alpha, score in metric.compute().items():
            assert scores[alpha] == pytest.approx(score, abs=1e-12)


# Student's t for 95 %, from tables.
@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (2, 4.303), (9, 2.262), (63, 1.998), (100_000, 1.960)])
def test_student_quantile(freedom: int, t: float) -> None:
    assert student_quantile(freedom) == pytest.approx(t, rel=5e-4)


def test_paired_gain_by_hand() -> None:
    before = torch.tensor([0.1, 0.5, 0.9])
    # Gains 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t of 2 degrees 4.3027.
    half = 4.3027 * 0.1 / math.sqrt(3)
    expected = {"mean": 0.2, "low": 0.2 - half, "high": 0.2 + half}
    assert paired_gain(before, before + torch.tensor([0.1, 0.2, 0.3])) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=r"N >= 2.*\(1,\) and \(1,\)"):
        paired_gain(before[:1], before[:1])


def test_interval_of_the_gain_holds_the_truth_19_times_of_20() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        noise = torch.randn(2, 8, generator=generator)
        gain = paired_gain(noise[0], noise[0] + 1 + noise[1])
        held += gain["low"] <= 1 <= gain["high"]
    assert 0.92 < held / 400 < 0.98


def test_kernel_distance_by_hand() -> None:
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    within_a, within_b = (1 * 2 + 1) ** 3, (1 + 1 + 27) / 3
    between = (1 + 8 + 27 + 1 + 27 + 125) / 6
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between)
    assert kernel_distance(a, b) == pytest.approx(kernel_distance(b, a))
    for bad in (a[:1], torch.ones(2, 3)):
        with pytest.raises(ValueError, match=rf"N, M >= 2.*{re.escape(str(tuple(bad.shape)))}"):
            kernel_distance(a, bad)


def test_kernel_distance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    same = torch.tensor([kernel_distance(*torch.randn(2, 40, 4, generator=generator)) for _ in range(300)])
    assert abs(same.mean()) < 3 * same.std() / math.sqrt(300)
    assert same.min() < 0
    # For unit Gaussians m apart in D dimensions, with s = |m|^2 / D, x.y / D + 1 has known moments:
    # E k(x, x') = 1 + 3/D, E k(y, y') = (1 + s)^3 + 3 (1 + s)(1 + 2 s) / D + 6 s / D^2, E k(x, y) = 1 + 3 (1 + s) / D.
    d, s = 4, 1.0
    apart = [
        kernel_distance(torch.randn(200, d, generator=generator), torch.randn(200, d, generator=generator) + 1)
        for _ in range(100)
    ]
    expected = (1 + 3 / d) + ((1 + s) ** 3 + 3 * (1 + s) * (1 + 2 * s) / d + 6 * s / d**2) - 2 * (1 + 3 * (1 + s) / d)
    assert sum(apart) / 100 == pytest.approx(expected, rel=0.05)


def coco_poses() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """predicted, target, visible and areas of the boxes around the visible ones of the 17 that COCO has."""
    predicted, target, visible, _ = random_images(6, seed=3)
    visible[:, 1] = False
    return predicted, target, visible, box_sides(target, visible).prod(-1)


def test_similarity_is_coco_s_formula() -> None:
    target = torch.zeros(1, 18, 2)
    visible = torch.zeros(1, 18, dtype=torch.bool)
    visible[0, [0, 2, 8]] = True  # nose, right shoulder, right hip
    predicted = target.clone()
    predicted[0, [0, 2, 8], 0] = torch.tensor([0.026, 0.158, 0.428]) * 20  # half, one and two of 2 sigma, by 20 pixels
    predicted[0, 3] = 1e4  # hidden
    area = torch.tensor([400.0])
    expected = (math.exp(-1 / 8) + math.exp(-1 / 2) + math.exp(-2)) / 3
    assert oks(predicted, target, visible, area).item() == pytest.approx(expected, rel=1e-5)
    # COCO has no neck.
    visible[0, 1] = True
    predicted[0, 1] = torch.inf
    assert oks(predicted, target, visible, area).item() == pytest.approx(expected, rel=1e-5)
    visible[:] = False
    visible[0, 1] = True
    with pytest.raises(ValueError, match=r"OKS .*\[0\]"):
        oks(predicted, target, visible, area)


def test_similarity_agrees_with_coco_s_own_evaluation() -> None:
    name = next((name for name in ("pycocotools", "faster_coco_eval.core") if find_spec(name.split(".")[0])), None)
    if name is None:
        pytest.skip("neither pycocotools nor faster-coco-eval is installed")
    coco, cocoeval = (importlib.import_module(f"{name}.{part}") for part in ("coco", "cocoeval"))
    predicted, target, visible, area = coco_poses()
    own = [KEYPOINTS.index(word) for word in COCO_KEYPOINTS]
    truth, found = coco.COCO(), []
    for i in range(len(target)):
        points = torch.cat([target[i], 2.0 * visible[i][:, None]], -1)[own]
        truth.dataset.setdefault("annotations", []).append(
            {"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "num_keypoints": int(visible[i].sum())}
            | {"area": float(area[i]), "bbox": [0, 0, 64, 64], "keypoints": points.flatten().tolist()}
        )
        points = torch.cat([predicted[i], torch.ones(18, 1)], -1)[own]
        found.append({"image_id": i, "category_id": 1, "score": 1.0, "keypoints": points.flatten().tolist()})
    truth.dataset |= {"images": [{"id": i} for i in range(len(target))], "categories": [{"id": 1, "name": "person"}]}
    truth.dataset["info"] = {}
    truth.createIndex()
    evaluation = cocoeval.COCOeval(truth, truth.loadRes(found), "keypoints")
    evaluation._prepare()
    theirs = [float(evaluation.computeOks(i, 1)[0, 0]) for i in range(len(target))]
    assert oks(predicted, target, visible, area).tolist() == pytest.approx(theirs, rel=1e-4)


def test_cmmd_is_the_published_formula() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    # Squared distances: 0 and 2 within a, 0 and 4 within b; between them 0, 4, 2, 2; sigma = 10, 2 sigma^2 = 200.
    within = (1 + math.exp(-0.01)) / 2 + (1 + math.exp(-0.02)) / 2
    between = (1 + math.exp(-0.02) + 2 * math.exp(-0.01)) / 4
    assert cmmd(a, b) == pytest.approx(1000 * (within - 2 * between), rel=1e-6)
    assert cmmd(a, a.flip(0)) == pytest.approx(0, abs=1e-9) and cmmd(b, a) == pytest.approx(cmmd(a, b))
    with pytest.raises(ValueError, match=r"N, M >= 2, got \(2, 2\) and \(1, 2\)"):
        cmmd(a, b[:1])
