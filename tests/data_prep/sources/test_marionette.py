"""Pairs of frames: rendered ones, folders of frames, and folders that hold no video."""

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from PIL import Image

from data_prep.marionette.video import draw_video, render_clip
from data_prep.prepare import build
from data_prep.records import Skip, SourceGroup
from data_prep.sources.folders import GAPS, VideoFolderSource, draw_pair
from data_prep.sources.marionette import MarionettePairs, draw_clip, head_turn
from rg.data.samples import DataError, Groups
from rg.data.shards import read_shards


def test_pairs_lie_between_the_gaps():
    pairs = [draw_pair(default_rng(seed), 10, (2, 5)) for seed in range(300)]
    assert {last - first for first, last in pairs} == {2, 3, 4, 5}
    assert min(first for first, _ in pairs) == 0 and max(last for _, last in pairs) == 9
    assert {draw_pair(default_rng(seed), 3, GAPS) for seed in range(5)} == {(0, 2)}


def test_a_rendered_pair_is_two_frames_of_its_video():
    clip, pair = (MarionettePairs(clips=clips).read("val", [3])[0] for clips in (True, False))
    whole = render_clip(draw_video((0, 1, 3), GAPS[1] + 1), seed=(0, 1, 3), points=1)
    count = len(clip.images)
    assert GAPS[0] < count <= GAPS[1] + 1
    starts = [i for i in range(25 - count) if torch.equal(whole.stills.image[i : i + count], clip.images)]
    assert len(starts) == 1
    assert torch.equal(pair.images, clip.images[[0, -1]])
    assert pair.points.shape == (96, 2, 3) and pair.points.dtype == torch.float32
    assert pair.prompt == whole.stills.prompt[starts[0]] and pair.seed == (0, 1, 3)
    assert torch.equal(pair.mask, whole.stills.instances[starts[0]] > 0)
    assert (pair.points[..., 2].any(1)).all() and pair.points[..., 2].all(1).sum() > 8
    again = MarionettePairs().read("val", [2, 3])[1]
    assert torch.equal(again.points, pair.points) and again.turn == pair.turn


def test_heads_that_turn_are_measured_in_portraits_alone():
    turns = []
    for index in range(20):
        scenes = draw_clip((0, 0, index), {"portrait": 1.0})
        facing = [
            s.people[0].pose["yaw"] + s.people[0].pose["head_yaw"] - s.camera.yaw for s in (scenes[0], scenes[-1])
        ]
        turns.append(head_turn(scenes[0], scenes[-1]))
        assert turns[-1] == pytest.approx(abs(np.degrees(facing[1] - facing[0])))
    assert max(turns) > 30 and all(turn < 180 for turn in turns)
    scenes = draw_video((0, 0, 0), 3, {"one": 1.0})
    assert head_turn(scenes[0], scenes[2]) is None


@pytest.fixture
def folder(tmp_path):
    """Two good videos of 6 frames of 32 x 40, one of a single frame, one of two sizes, one with a damaged frame."""
    rng, videos = np.random.default_rng(0), tmp_path / "videos"
    for name, count in {"bear": 6, "sub/cow": 6, "lone": 1, "mixed": 3, "torn": 3}.items():
        (videos / name).mkdir(parents=True)
        base = rng.integers(256, size=(8, 10, 3), dtype=np.uint8)
        for number in range(count):
            size = (48, 40) if (name, number) == ("mixed", 2) else (40, 32)
            frame = Image.fromarray(np.roll(base, number, 1)).resize(size, Image.Resampling.BICUBIC)
            frame.save(videos / name / f"{number:05}.jpg")
    (videos / "torn/00001.jpg").write_bytes(b"no image")
    (videos / "bear.txt").write_text("a bear walks\n")
    return videos


def make_source(folder, **settings):
    shares = {"validation_share": 0.0, "test_share": 0.0}
    return VideoFolderSource(path=str(folder), resolution=32, pairs=2, **{"clips": True, **shares, **settings})


def test_every_video_gives_its_pairs_or_says_why_not(folder):
    source = make_source(folder)
    assert source.count("train") == 10 and source.count("val") == 0
    items = source.read("train", range(10))
    good = [item for item in items if isinstance(item, SourceGroup)]
    assert [item.name.split(",")[0] for item in good] == ["bear", "bear", "sub/cow", "sub/cow"]
    assert all(3 <= len(item.images) <= 6 and item.images.shape[1:] == (3, 32, 32) for item in good)
    assert [item.prompt for item in good] == ["a bear walks"] * 2 + [""] * 2
    reasons = [item.reason for item in items if isinstance(item, Skip)]
    assert reasons[:2] == ["lone: expected more than 2 frames, found 1"] * 2
    assert reasons[2:4] == ["mixed: expected frames of one size, found [(40, 32), (48, 40)]"] * 2
    assert all(reason.startswith("torn: a frame or mask cannot be read: ") for reason in reasons[4:])
    assert torch.equal(make_source(folder, clips=False).read("train", [1])[0].images, good[1].images[[0, -1]])


def test_masks_are_cropped_as_the_frames_are(folder, tmp_path):
    (tmp_path / "masks/bear").mkdir(parents=True)
    objects = np.zeros((32, 40), np.uint8)
    objects[10:20, 4:8] = 2  # a palette's index, the first four columns of the square
    for number in range(6):
        Image.fromarray(objects).convert("P").save(tmp_path / f"masks/bear/{number:05}.png")
    source = make_source(folder, masks=str(tmp_path / "masks"))
    bear, cow = source.read("train", [0, source.videos["train"].index("sub/cow") * 2])
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[10:20, :4] = True
    assert torch.equal(bear.mask, expected)
    assert cow.reason.startswith("sub/cow: a frame or mask cannot be read") and "masks/sub/cow/0000" in cow.reason


def test_a_mask_of_four_channels_is_white_where_the_thing_is(tmp_path):
    square = np.zeros((64, 64), np.uint8)
    square[20:40, 20:40] = 255
    for name in ("videos/clip", "masks/clip"):
        (tmp_path / name).mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (64, 64), (20 * number, 9, 9)).save(tmp_path / f"videos/clip/{number}.png")
        opaque = np.dstack([square] * 3 + [np.full_like(square, 255)])
        Image.fromarray(opaque).save(tmp_path / f"masks/clip/{number}.png")
    shares = {"validation_share": 0.0, "test_share": 0.0}
    videos = {"path": str(tmp_path / "videos"), "masks": str(tmp_path / "masks"), "resolution": 64}
    source = VideoFolderSource(**videos, **shares, pairs=1, gaps=(2, 2))
    assert torch.equal(source.read("train", [0])[0].mask, torch.from_numpy(square > 0))
    Image.new("RGB", (64, 64)).save(tmp_path / "videos/clip/1.jpg")
    with pytest.raises(ValueError, match=r"pictures\.path=.*clip/1\.jpg and clip/1\.png"):
        VideoFolderSource(**videos, **shares)
    assert VideoFolderSource(**videos | {"masks": None}, **shares).count("train") == 50


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(tmp_path / f"clip/frame{number}.png")
    shares = {"validation_share": 0.0, "test_share": 0.0}
    source = VideoFolderSource(path=str(tmp_path), resolution=8, pairs=1, gaps=(11, 11), clips=True, **shares)
    assert (source.read("train", [0])[0].images[:, 0, 0, 0] // 20).tolist() == list(range(12))


def test_splits_are_by_video_and_names_are_watched(folder):
    source = make_source(folder, validation_share=0.5)
    assert set(source.videos["train"]) | set(source.videos["val"]) == {"bear", "sub/cow", "lone", "mixed", "torn"}
    assert 0 < len(source.videos["val"]) < 5
    split = next(split for split, videos in source.videos.items() if "bear" in videos)
    before = source.describe(split)
    (folder / "bear/00006.jpg").write_bytes((folder / "bear/00005.jpg").read_bytes())
    assert make_source(folder, validation_share=0.5).describe(split) != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "nowhere"}, "pictures.path=nowhere: .*folder.* none"),
        ({"masks": "nowhere"}, "pictures.masks=nowhere: .*folder.* none"),
        ({"gaps": (3, 2)}, r"gaps.* 1.*gaps=\(3, 2\)"),
        ({"pairs": 0}, "pairs.* 1.*pairs=0"),
    ],
)
def test_bad_settings(folder, change, words):
    settings = {"path": str(folder), "resolution": 32, "pairs": 2} | change
    with pytest.raises(ValueError, match=words):
        VideoFolderSource(**settings)


@pytest.fixture
def recipe(folder, tmp_path, tiny_pipeline):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    source = {"_target_": "data_prep.sources.folders.VideoFolderSource", "path": str(folder), "resolution": 32}
    shares = {"pairs": 2, "clips": True, "validation_share": 0.0, "test_share": 0.0}
    tracker = {"_target_": "data_prep.annotators.tracks.LucasKanade"}
    tracks = {"_target_": "data_prep.annotators.tracks.TrackerTracks", "tracker": tracker, "min_points": 2}
    backbone = {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": str(tmp_path / "model")}
    return {"source": source | shares, "annotator": tracks, "backbone": backbone, "shard_size": 4}


def test_shards_of_pairs_count_and_name_what_they_lack(recipe, tmp_path):
    manifest = build(root=str(tmp_path / "out"), **recipe)
    kept = manifest.indices()
    assert set(kept) | {int(key) for key in manifest.skipped} == set(range(10))
    assert sum("expected more than 2 frames, found 1" in reason for reason in manifest.skipped.values()) == 2
    assert kept and set(kept) <= {0, 1, 6, 7}  # of the bear and the cow
    groups = read_shards(tmp_path / "out/train")
    assert isinstance(groups, Groups) and groups.index.tolist() == kept
    assert groups[0]["image"].shape == (2, 3, 32, 32) and groups.latent.shape[1:] == (2, 8, 8, 8)
    assert groups.turn.isnan().all() and (groups.points[..., 2].all(2).sum(1) >= 2).all()
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out/train").iterdir()}
    for n in (3, 10):
        build(root=str(tmp_path / "parts"), n=n, **recipe)
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts/train").iterdir()} == whole


def test_a_folder_without_a_usable_pair_is_an_error_before_training(recipe, tmp_path):
    recipe["annotator"]["min_points"] = 1000
    manifest = build(root=str(tmp_path / "out"), **recipe)
    assert not manifest.indices() and len(manifest.skipped) == 10
    assert sum("expected 1000 points visible in both frames" in reason for reason in manifest.skipped.values()) == 4
    with pytest.raises(DataError, match="at least 1 samples.* 0 .*10 indices"):
        read_shards(tmp_path / "out/train")
