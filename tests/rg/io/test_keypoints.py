import json
from pathlib import Path

import pytest
import torch

from rg.io.images import load_control
from rg.io.keypoints import MAX_BYTES, MAX_PEOPLE, Pose, read_pose, to_tensor
from rg.points import draw_skeletons, heatmaps


def person(**changed: list) -> list[list]:
    """Eighteen visible keypoints but for k3=[x, y, visible]."""
    keypoints = [[float(k), 2.0 * k, 1] for k in range(18)]
    for name, keypoint in changed.items():
        keypoints[int(name[1:])] = keypoint
    return keypoints


def read(path: Path, *people: list) -> torch.Tensor:
    path.write_text(json.dumps({"keypoints": people}))
    return to_tensor(read_pose(path, Pose).keypoints)


@pytest.mark.parametrize(
    "hidden", [[float("nan")] * 2, [None, None], ["-", []], [float("inf"), 1e300], [True, 10**400]]
)
def test_what_is_hidden_is_not_read(tmp_path, hidden):
    for visible in (0, 0.0, False, -1):
        found = read(tmp_path / "a.json", person(k3=[*hidden, visible]))
        assert found[0, 3].tolist() == [0, 0, visible] and found[0, 4].tolist() == [4, 8, 1]
    assert read(tmp_path / "a.json", person(k3=[-7.5, 9, 0]))[0, 3].tolist() == [-7.5, 9, 0]
    assert read(tmp_path / "a.json", person(k3=[1, 2, True]))[0, 3].tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("keypoint", "words"),
    [
        ([float("nan"), 1, 1], r"keypoints\.0\.3\.0: .*finite.* nan"),
        ([1, None, 0.5], r"keypoints\.0\.3\.1: .*number.* None"),
        ([1, "2", 2], r"keypoints\.0\.3\.1: .*number.* '2'"),
        ([1e300, 2, 1], r"keypoints\.0\.3\.0: .*1e\+300"),
        ([1, 2, float("nan")], r"keypoints\.0\.3\.2: .*finite.* nan"),
        ([1, 2, None], r"keypoints\.0\.3\.2: .*number.* None"),
        ([1, 2], r"keypoints\.0\.3: .*3.* \[1, 2\]"),
        (7, r"keypoints\.0\.3: .*list.* 7"),
    ],
)
def test_a_visible_keypoint_that_is_no_place_is_one_error(tmp_path, keypoint, words):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a.json: {words}$"):
        read(tmp_path / "a.json", person(k3=keypoint))


def test_a_crowd_has_an_end(tmp_path):
    assert len(read(tmp_path / "a.json", *[person()] * MAX_PEOPLE)) == MAX_PEOPLE
    with pytest.raises(ValueError, match=f"keypoints: expected at most {MAX_PEOPLE}"):
        read(tmp_path / "a.json", *[[]] * (MAX_PEOPLE + 1))
    with (tmp_path / "million.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(ValueError, match=f"million.json: expected at most {MAX_BYTES:,} bytes, found 1,000,000,000"):
        read_pose(tmp_path / "million.json", Pose)


def test_a_control_with_a_hidden_keypoint_that_is_nan_and_a_mark_at_its_beginning(tmp_path):
    content = {"size": [64, 64], "keypoints": [person(k3=[float("nan"), float("nan"), 0])]}
    (tmp_path / "pose.JSON").write_text(json.dumps(content), encoding="utf-8-sig")
    control = load_control(tmp_path / "pose.JSON", (32, 32))
    assert control.isfinite().all() and control[0, 0, 3, 2] == 0 and control[0, 0, 1].tolist() == [0.25, 0.75, 1]


def test_drawings_of_hidden_keypoints_that_are_nan():
    poses = torch.tensor([[person(k3=[5.0, 5.0, 0.0])]])
    unknown = poses.clone()
    unknown[0, 0, 3, :2] = torch.nan
    for draw in (lambda x: heatmaps(x, (32, 32), (8, 8), 1.0), lambda x: draw_skeletons(x, (32, 32), (32, 32), 2.0)):
        assert torch.equal(draw(unknown), draw(poses)) and draw(poses).any()
