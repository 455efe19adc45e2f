"""Drags on the embedded model: their geometry by hand, what counts as left alone, and that a stopped run goes on."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from experiments.applications.bench import table
from experiments.applications.drags import Drags, draw_drag, fidelity, moved_part, run
from experiments.applications.drawing import draw_arrows, draw_boxes
from rg.cli import compose_config
from rg.points import KEYPOINTS

SIZE = (64, 64)


def person(**places):
    """Keypoints (18, 3), of which only those named are visible."""
    keypoints = torch.zeros(18, 3)
    for name, (x, y) in places.items():
        keypoints[KEYPOINTS.index(name)] = torch.tensor([x, y, 1.0])
    return keypoints


def test_a_limb_turns_around_its_joint_by_the_length_asked_for():
    keypoints = person(left_wrist=(40, 30), left_shoulder=(30, 30))
    goals = set()
    for seed in range(8):
        index, goal, pivot = draw_drag(keypoints, 8.0, SIZE, torch.Generator().manual_seed(seed))
        assert index == KEYPOINTS.index("left_wrist") and pivot.tolist() == [30, 30]
        assert float((goal - torch.tensor([40.0, 30.0])).norm()) == pytest.approx(8, abs=1e-4)
        assert float((goal - pivot).norm()) == pytest.approx(10, abs=1e-4)
        goals.add(round(float(goal[1])))
    assert len(goals) == 2  # to the one side and to the other


def test_what_cannot_turn_is_not_dragged():
    generator = torch.Generator().manual_seed(0)
    assert draw_drag(person(left_wrist=(40, 30)), 8.0, SIZE, generator) is None  # no shoulder
    assert draw_drag(person(left_wrist=(33, 30), left_shoulder=(30, 30)), 8.0, SIZE, generator) is None  # too short
    edge = person(right_ankle=(63, 30), right_hip=(33, 30))
    for seed in range(8):  # both ways stay inside; from the corner only one does
        assert draw_drag(edge, 8.0, SIZE, torch.Generator().manual_seed(seed)) is not None
    corner = person(right_ankle=(33, 63), right_hip=(3, 63))
    goals = {draw_drag(corner, 8.0, SIZE, torch.Generator().manual_seed(seed))[1][1] < 63 for seed in range(8)}
    assert goals == {torch.tensor(True)} or all(goals)


def make_drags():
    points = (torch.tensor([[40.0, 30.0]]), torch.tensor([[30.0, 40.0]]), torch.tensor([[30.0, 30.0]]))
    points = (*points, torch.tensor([[35.0, 32.0]]))
    return Drags(torch.tensor([7]), *points)


def test_the_moved_part_is_the_sector_and_what_is_near():
    near = moved_part(make_drags(), SIZE, reach=3.0)[0]
    assert near[30, 40] and near[40, 30] and near[35, 35] and near[30, 30] and near[27, 35]
    assert not near[26, 35] and not near[45, 45] and not near[10, 10] and not near[30, 45]


def test_points_of_a_limb_turn_as_a_whole():
    drags = make_drags()
    sources, goals = drags.along(4)
    assert torch.allclose(sources[0], torch.tensor([[40.0, 30.0], [37.5, 31.0], [35.0, 32.0], [32.5, 31.0]]))
    assert torch.allclose(goals[0], torch.tensor([[30.0, 40.0], [29.0, 37.5], [28.0, 35.0], [29.0, 32.5]]), atol=1e-5)
    (source,), (goal,) = drags.along(1)
    assert torch.equal(source, drags.source) and torch.allclose(goal, drags.destination, atol=1e-5)


def test_fidelity_is_the_psnr_of_what_should_stay():
    reference, outside = torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    outside[:, :4] = False
    edited = reference.clone()
    edited[:, :, :4] = 1.0  # what may change
    edited[1, :, 4:] = 0.2
    same, changed = fidelity(edited, reference, outside).tolist()
    assert same == pytest.approx(10 * math.log10(4 / 1e-10)) and changed == pytest.approx(10 * math.log10(4 / 0.04))


def test_the_table_compares_with_unguided_images():
    scores = {
        "unguided": {"distance, a": [8.0, 8.0, 8.0], "PSNR outside": [30.0, 30.0, 30.0]},
        "head": {"distance, a": [2.0, 3.0, 4.0], "PSNR outside": [25.0, 26.0, 27.0]},
    }
    half = 4.302653 / math.sqrt(3)
    assert f"| head | 3.00 ({-5 - half:+.2f} to {-5 + half:+.2f}) | 26.00 |" in (
        text := table(scores, "unguided", ["distance"])
    )
    assert "| unguided | 8.00 | 30.00 |" in text


def test_an_arrow_is_drawn_from_the_point_to_its_goal():
    drags = make_drags()
    drawn = draw_arrows(torch.zeros(1, 3, 64, 64), drags.source, drags.destination)
    yellow = (drawn[0, 0] > 0.5) & (drawn[0, 2] < 0.5)
    rows, columns = yellow.nonzero().unbind(1)
    assert drawn.shape[-2:] == (256, 256) and 116 <= rows.min() <= 128 and 156 <= columns.max() <= 168


def test_a_box_is_drawn_inside_its_ends():
    drawn = draw_boxes(torch.zeros(1, 3, 64, 64), torch.tensor([[10, 20, 30, 50]]))
    rows, columns = ((drawn[0, 0] > 0.5) & (drawn[0, 2] < 0.5)).nonzero().unbind(1)
    assert 39 <= columns.min() <= 41 and 118 <= columns.max() <= 120 and 198 <= rows.max() <= 200


def test_a_method_without_weights_and_an_unknown_head_are_named(tmp_path):
    base = compose_config("experiments/drags", ["images=2"])
    zero = {"x": {"heads": {"correspondence": 0}}}  # and what is null is left out
    for methods, named in (({"x": {"weights": 1}}, "methods.x"), ({"x": None}, "at least one"), (zero, "other than 0")):
        with pytest.raises(ValueError, match=named):
            run(OmegaConf.merge(base, {"methods": None}, {"methods": methods}), tmp_path, "")


@pytest.mark.slow
def test_images_that_are_there_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["images=3", "batch_size=2", "+sampling.num_inference_steps=3", "split=search"]
    words += ["~methods.raw_features", "~methods.both_heads", "methods.correspondence.guidance.readout_scale=0.0"]
    cfg = compose_config("experiments/drags", words)
    folder = tmp_path / "run"
    first = run(cfg, folder, "command")
    # At strength 0 guidance changes nothing.
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in first.splitlines()[2:]}
    assert [cell.split(" ")[0] for cell in rows["| correspondence"]] == [
        cell.split(" ")[0] for cell in rows["| unguided"]
    ]
    made = folder / "correspondence" / "00002.png"
    (folder / "correspondence" / "00000.png").unlink()
    before = made.stat().st_mtime_ns
    assert run(cfg, folder, "command") == first and made.stat().st_mtime_ns == before
