"""Drags on the embedded model: their geometry by hand, what counts as left alone, and that a stopped run goes on."""

import math

import pytest
import torch
from omegaconf import OmegaConf

from experiments.applications.bench import table
from experiments.applications.drags import Drags, draw_arrows, draw_drag, fidelity, moved_part, run
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
    return Drags(torch.tensor([7]), *points)


def test_the_moved_part_is_the_sector_and_what_is_near():
    near = moved_part(make_drags(), SIZE, reach=3.0)[0]
    assert near[30, 40] and near[40, 30] and near[35, 35] and near[30, 30] and near[27, 35]
    assert not near[26, 35] and not near[45, 45] and not near[10, 10] and not near[30, 45]


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
    drawn = draw_arrows(torch.zeros(1, 3, 64, 64), make_drags(), scale=2)
    yellow = (drawn[0, 0] > 0.5) & (drawn[0, 2] < 0.5)
    rows, columns = yellow.nonzero().unbind(1)
    assert drawn.shape[-2:] == (128, 128) and 58 <= rows.min() <= 64 and 78 <= columns.max() <= 84


def test_a_method_without_weights_and_an_unknown_head_are_named(tmp_path):
    base = compose_config("experiments/drags", ["images=2"])
    for methods, named in (({"x": {"weights": 1}}, "methods.x"), ({"x": None}, "methods.x")):
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
