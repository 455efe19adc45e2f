"""People: planted heatmaps and part fields give the planted people, and a graph of TensorFlow.js what torch gives."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.annotators.pose.blazepose import BlazePose
from data_prep.annotators.pose.movenet import MoveNet
from data_prep.annotators.pose.openpose import FIELD_OF, JOINED, OpenPose, find_peaks, find_people
from data_prep.annotators.pose.openpose_network import OpenPoseNetwork
from data_prep.annotators.pose.people import PoseAnnotator, from_coco
from data_prep.annotators.pose.tensorflow_js import GraphModel
from data_prep.records import Label, Skip, SourceSample
from rg.points import KEYPOINTS, heatmaps, rescale

SIDE, CELLS = 368, 46


def standing(left, top, height, hidden=()):
    """A person (18, 3) who faces the camera, in pixels."""
    shape = {
        "nose": (0.5, 0.08), "neck": (0.5, 0.2), "right_shoulder": (0.36, 0.2), "right_elbow": (0.3, 0.36),
        "right_wrist": (0.28, 0.5), "left_shoulder": (0.64, 0.2), "left_elbow": (0.7, 0.36), "left_wrist": (0.72, 0.5),
        "right_hip": (0.42, 0.5), "right_knee": (0.41, 0.74), "right_ankle": (0.4, 0.97), "left_hip": (0.58, 0.5),
        "left_knee": (0.59, 0.74), "left_ankle": (0.6, 0.97), "right_eye": (0.47, 0.05), "left_eye": (0.53, 0.05),
        "right_ear": (0.42, 0.07), "left_ear": (0.58, 0.07),
    }  # fmt: skip
    points = torch.tensor([shape[name] for name in KEYPOINTS]) * height + torch.tensor([left, top])
    visible = torch.tensor([[name not in hidden] for name in KEYPOINTS]).float()
    return torch.cat([points, visible], -1)


def plant(people):
    """The maps (57, 46, 46) that a perfect network would give for people (P, 18, 3) in an image of 368 x 368."""
    size, cells = (SIDE, SIDE), (CELLS, CELLS)
    heights = heatmaps(people[None], size, cells, sigma=0.9)[0]
    fields = torch.zeros(38, CELLS, CELLS)
    grid = torch.stack(torch.meshgrid(torch.arange(46.0), torch.arange(46.0), indexing="xy"), -1)
    for person in people:
        for (start, end), field in zip(JOINED, FIELD_OF, strict=True):
            if person[start, 2] and person[end, 2]:
                a, b = rescale(person[[start, end], :2], size, cells)
                along = (b - a) / (b - a).norm()
                share = ((grid - a) @ along).clamp(0, float((b - a).norm()))
                near = (grid - a - share[..., None] * along).norm(dim=-1) <= 1.2
                fields[field : field + 2] = torch.where(near, along[:, None, None], fields[field : field + 2])
    return torch.cat([fields, heights, 1 - heights.amax(0, keepdim=True)])


def by_place(people):
    return people[people[..., 0].argsort(0)[:, 1]]


def test_the_limbs_and_fields_are_those_of_openpose():
    """Its own table: limbs of keypoints counted from 1, and the fields of each, counted after the 19 heatmaps."""
    limbs = [(2, 3), (2, 6), (3, 4), (4, 5), (6, 7), (7, 8), (2, 9), (9, 10), (10, 11), (2, 12), (12, 13), (13, 14)]
    limbs += [(2, 1), (1, 15), (15, 17), (1, 16), (16, 18), (3, 17), (6, 18)]
    fields = [31, 39, 33, 35, 41, 43, 19, 21, 23, 25, 27, 29, 47, 49, 53, 51, 55, 37, 45]
    assert [(a + 1, b + 1) for a, b in JOINED] == limbs and [field + 19 for field in FIELD_OF] == fields
    assert sorted(FIELD_OF) == list(range(0, 38, 2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_planted_people_are_found_with_every_joint(count):
    people = torch.stack([standing(x, y, h) for x, y, h in [(-30, 20, 260), (80, 40, 300), (200, 130, 220)][:count]])
    found = find_people(plant(people), (SIDE, SIDE))
    assert found.shape == (count, 18, 3) and (found[..., 2] == 1).all()
    assert (by_place(found) - by_place(people))[..., :2].norm(dim=-1).max() < 2.5


def test_hidden_joints_stay_hidden_and_a_body_in_two_pieces_is_joined_by_its_neck():
    hidden = ("right_wrist", "left_knee", "left_ankle", "left_ear", "nose")
    person = standing(40, 30, 300, hidden)
    (found,) = find_people(plant(person[None]), (SIDE, SIDE))
    # Without a nose nothing joins the left eye; the right eye hangs on the right ear, and that on the shoulder.
    expected = person[:, 2].clone()
    expected[KEYPOINTS.index("left_eye")] = 0
    assert torch.equal(found[:, 2], expected)
    seen = expected > 0
    assert (found - person)[seen, :2].norm(dim=-1).max() < 2.5


def test_joints_without_a_field_make_no_person():
    maps = plant(standing(40, 30, 300)[None])
    maps[:38] = 0
    assert find_people(maps, (SIDE, SIDE)).shape == (0, 18, 3)
    assert find_people(torch.zeros(57, 46, 46), (SIDE, SIDE)).shape == (0, 18, 3)
    three = standing(40, 30, 300, [name for name in KEYPOINTS if name not in ("neck", "right_shoulder", "right_elbow")])
    assert len(find_people(plant(three[None]), (SIDE, SIDE))) == 0, "four joints make a person"


def test_a_peak_lies_between_the_pixels():
    y, x = np.mgrid[:40, :60]
    bump = np.exp(-((x - 31.3) ** 2 + (y - 17.8) ** 2) / (2 * 4**2)).astype(np.float32)
    ((px, py, height),) = find_peaks(bump)
    assert abs(px - 31.3) < 0.05 and abs(py - 17.8) < 0.05 and 0.95 < height <= 1
    assert find_peaks(0.09 * bump).shape == (0, 3)


class Known(PoseAnnotator):
    """Finds the people it was given."""

    def __init__(self, people, **settings):
        super().__init__(**settings)
        self.people = people

    def find(self, images):
        return self.people[: len(images)]


def sample(side=64):
    return SourceSample(torch.zeros(3, side, side, dtype=torch.uint8), "", "picture", file=Path("a/b.png"))


def test_nobody_is_an_empty_label_or_counted_as_skipped():
    nobody = torch.zeros(0, 18, 3)
    outside = standing(200, 0, 60)[None]
    first, second = Known([nobody, outside]).annotate([sample(), sample()])
    assert first == second == Skip("a/b.png has no label: no person was found")
    (label,) = Known([nobody], keep_empty=True).annotate([sample()])
    assert isinstance(label, Label) and label.keypoints.shape == (0, 18, 3) and not label.image.any()


def test_a_joint_outside_of_the_image_is_not_seen():
    (label,) = Known([standing(5, 30, 60)[None]]).annotate([sample()])
    keypoints = label.keypoints[0]
    assert not keypoints[KEYPOINTS.index("left_ankle"), 2] and keypoints[KEYPOINTS.index("neck"), 2]
    assert label.image.any() and label.image.dtype == torch.uint8


def test_cocos_keypoints_get_a_neck_between_the_shoulders():
    names = ["nose", "left_eye", "right_eye", "left_ear", "right_ear"]
    names += [
        f"{side}_{part}"
        for part in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
        for side in ("left", "right")
    ]
    coco = torch.tensor([[float(i), 2.0 * i, 1.0] for i in range(17)])[None]
    (person,) = from_coco(coco)
    for name, point in zip(KEYPOINTS, person, strict=True):
        expected = [5.5, 11, 1] if name == "neck" else coco[0, names.index(name)].tolist()
        assert point.tolist() == expected, name
    coco[0, names.index("left_shoulder"), 2] = 0
    assert from_coco(coco)[0, KEYPOINTS.index("neck"), 2] == 0


def test_the_side_of_what_a_network_sees_fits_its_stride(tmp_path):
    with pytest.raises(ValueError, match="side: .*8.*100"):
        OpenPose(weights=str(tmp_path / "x.pth"), revision="main", side=100)
    with pytest.raises(ValueError, match="side: .*32.*100"):
        MoveNet(folder=str(tmp_path), side=100)
    with pytest.raises(FileNotFoundError, match="movenet-multipose.json"):
        MoveNet(folder=str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match="pose_detection.tflite|ai-edge-litert"):
        BlazePose(folder=str(tmp_path))


def test_openpose_reads_its_file_and_finds_nobody_in_empty_maps(tmp_path):
    with torch.device("meta"):
        expected = OpenPoseNetwork().state_dict()
    state = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in expected.items()}
    torch.save(state, tmp_path / "body.pth")
    annotator = OpenPose(weights=str(tmp_path / "body.pth"), revision="main", side=32)
    assert annotator.annotate([sample()])[0] == Skip("a/b.png has no label: no person was found")


def words(*numbers):
    return {"list": {"i": [str(number) for number in numbers]}}


def text(value):
    return base64.b64encode(value.encode()).decode()


def graph(tmp_path, nodes, weights, output):
    """A model of TensorFlow.js: nodes (name, operation, inputs, attributes) and weights in half precision."""
    entries = [
        {"name": name, "shape": list(value.shape), "dtype": "float32" if value.dtype.kind == "f" else "int32"}
        for name, value in weights.items()
    ]
    for entry in entries:
        if entry["dtype"] == "float32":
            entry["quantization"] = {"dtype": "float16"}
    data = b"".join(
        value.astype(np.float16 if value.dtype.kind == "f" else np.int32).tobytes() for value in weights.values()
    )
    (tmp_path / "m.bin").write_bytes(data)
    listed = [{"name": name, "op": op, "input": inputs, "attr": attr} for name, op, inputs, attr in nodes]
    model = {
        "modelTopology": {"node": listed + [{"name": name, "op": "Const"} for name in weights]},
        "signature": {"outputs": {"y": {"name": output}}},
        "weightsManifest": [{"paths": ["m.bin"], "weights": entries}],
    }
    (tmp_path / "m.json").write_text(json.dumps(model))
    return tmp_path / "m.json"


def test_a_graph_gives_what_torch_gives(tmp_path):
    rng = np.random.default_rng(0)
    half = lambda *shape: rng.normal(size=shape).astype(np.float16).astype(np.float32)  # noqa: E731
    weights = {
        "w": half(3, 3, 3, 4),
        "b": half(4),
        "d": half(3, 3, 4, 1),
        "k": np.int32(3),
        "axis": np.array([1, 2], np.int32),
    }
    weights |= {
        "from": np.array([0, 0, 1], np.int32),
        "to": np.array([0, 0, 9], np.int32),
        "by": np.array([1, 1, 2], np.int32),
    }
    same = {"padding": {"s": text("SAME")}}
    fused = {"fused_ops": {"list": {"s": [text("BiasAdd"), text("Relu6")]}}}
    nodes = [
        ("x", "Placeholder", [], {}),
        ("float", "Cast", ["x"], {"DstT": {"type": "DT_FLOAT"}}),
        ("conv", "_FusedConv2D", ["float", "w", "b"], {"strides": words(1, 2, 2, 1), **same, **fused}),
        ("deep", "DepthwiseConv2dNative", ["conv", "d"], {"strides": words(1, 1, 1, 1), **same}),
        ("pool", "MaxPool", ["deep"], {"ksize": words(1, 3, 3, 1), "strides": words(1, 1, 1, 1), **same}),
        ("most", "Max", ["pool", "axis"], {"keep_dims": {"b": False}}),
        ("top", "TopKV2", ["most", "k"], {}),
        ("sum", "AddV2", ["top", "top:1"], {}),
        ("part", "StridedSlice", ["sum", "from", "to", "by"],
         {"new_axis_mask": {"i": "1"}, "begin_mask": {"i": "2"}, "end_mask": {"i": "2"}}),
    ]  # fmt: skip
    model = GraphModel(graph(tmp_path, nodes, weights, "part:0"))
    x = torch.randint(0, 9, (1, 7, 8, 3), generator=torch.Generator().manual_seed(0)).int()
    w, b, d = (torch.from_numpy(weights[name]) for name in "wbd")
    # TensorFlow pads what is odd to the right and below: 7 rows by 1 and 1, 8 columns by 0 and 1.
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2).float(), (0, 1, 1, 1))
    conv = torch.nn.functional.conv2d(padded, w.permute(3, 2, 0, 1), b, stride=2).clamp(0, 6)
    deep = torch.nn.functional.conv2d(conv, d.permute(2, 3, 0, 1), padding=1, groups=4)
    values, places = torch.nn.functional.max_pool2d(deep, 3, 1, padding=1).amax((2, 3)).topk(3)
    torch.testing.assert_close(model(x=x), (values + places)[None, :, 1::2])


def test_a_graph_that_cannot_be_run_is_one_clear_error(tmp_path):
    path = graph(
        tmp_path, [("x", "Placeholder", [], {}), ("y", "Softsign", ["x"], {})], {"w": np.zeros(3, np.float32)}, "y"
    )
    with pytest.raises(ValueError, match=r"m\.json: .*Softsign"):
        GraphModel(path)
    (tmp_path / "m.bin").write_bytes(b"12")
    with pytest.raises(ValueError, match=r"m\.bin: .*w at byte 0.* 2 bytes"):
        GraphModel(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"m\.json: expected a graph model"):
        GraphModel(path)
