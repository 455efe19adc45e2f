"""What needs the model hub: `make test-online` loads the public weights, and looks at what they say of a photograph."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from data_prep.annotators.tracks import LucasKanade
from data_prep.cropping import crop_image
from data_prep.records import SourceSample
from rg.io.images import open_image
from rg.points import KEYPOINTS

pytestmark = pytest.mark.online


@pytest.fixture(scope="module")
def hub() -> None:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info("lllyasviel/Annotators", timeout=10)
    except Exception as error:
        pytest.skip(f"the model hub cannot be reached: {type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def astronaut(real: Path) -> SourceSample:
    image = crop_image(open_image(next(real.rglob("astronaut.png"))), 512)
    return SourceSample(image, "", "photograph", file=Path("astronaut.png"))


def annotator(root: Path, group: str, choice: str):
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        config = compose("prepare", ["pictures=folder", f"pictures/{group}={choice}"])
    return instantiate(config.pictures[group], _convert_="all")


def test_openpose_finds_the_astronaut(hub, astronaut, root):
    (label,) = annotator(root, "pose", "openpose").annotate([astronaut])
    (person,) = label.keypoints
    nose, neck = (person[KEYPOINTS.index(name)] for name in ("nose", "neck"))
    assert nose[2] and neck[2] and nose[1] < neck[1] and abs(nose[0] - neck[0]) < 100


def test_edges_lie_where_the_photograph_changes(hub, astronaut, root):
    (label,) = annotator(root, "edge", "hed").annotate([astronaut])
    grey = astronaut.image.float().mean(0)
    change = (grey.diff(dim=0)[:, 1:].abs() + grey.diff(dim=1)[1:].abs()).flatten()
    edges = label.image[0, 1:, 1:].float().flatten()
    assert torch.corrcoef(torch.stack([change, edges]))[0, 1] > 0.2 and edges.std() > 10


@pytest.mark.parametrize("choice", ["midas", "depth_anything"])
def test_the_astronaut_is_nearer_than_the_wall(hub, astronaut, root, choice):
    (label,) = annotator(root, "depth", choice).annotate([astronaut])
    assert label.image[0, 300:400, 150:250].float().mean() > label.image[0, :60, 300:360].float().mean() + 40


def test_cotracker_agrees_with_optical_flow(hub, real, root):
    from data_prep.sources.videos import VideoFileSource

    place = next(real.rglob("carphone_pristine.mp4")).parent
    source = VideoFileSource(path=str(place), resolution=256, pairs=1, gaps=(8, 8), clips=True)
    clip = next(source.read(split, [0])[0] for split in ("train", "val", "test") if source.count(split))
    queries = torch.tensor([[0.0, x, y] for x in range(32, 256, 32) for y in range(32, 256, 32)])
    tracks, seen = annotator(root, "tracker", "cotracker").track(clip.images, queries)
    others, seen_too = LucasKanade(window=21, levels=3, max_error=1.0).track(clip.images, queries)
    both = seen[-1] & seen_too[-1]
    assert both.sum() > 10 and (tracks - others)[-1, both].norm(dim=-1).median() < 1.5
