"""Public data sets, in small folders of exactly their layouts, and videos as files."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.annotators.rendered import ExactPose
from data_prep.prepare import build
from data_prep.records import Skip
from data_prep.sources.datasets import COCO, DAVIS, FACE, VOC, CelebAHQ
from data_prep.sources.videos import VideoFileSource
from rg.data.shards import read_shards
from rg.points import KEYPOINTS

SHARES = {"validation_share": 0.0, "test_share": 0.0}


def save(path, size=(48, 40), level=None, seed=0):
    """An image of noise, or of one level, (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise if level is None else np.full_like(noise, level)).save(path)


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("Annotations", "ImageSets/Main", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
    for number in range(12):
        save(root / f"JPEGImages/2007_{number:06}.jpg", level=20 * number)
    save(root / "SegmentationClass/2007_000001.png")
    return tmp_path


def test_voc_gives_all_its_images_in_an_order_of_its_own(voc):
    source = VOC(path=str(voc), resolution=32, **SHARES)
    names = [sample.file.name for sample in source.read("train", range(12))]
    assert len(set(names)) == 12 and names != sorted(names)
    assert [f.name for f in VOC(path=str(voc / "VOCdevkit/VOC2012"), resolution=32, **SHARES).files["train"]] == names
    assert [f.name for f in VOC(path=str(voc), resolution=32, seed=1, **SHARES).files["train"]] != names
    (voc / "VOCdevkit/VOC2012/JPEGImages" / names[5]).unlink()
    rest = VOC(path=str(voc), resolution=32, **SHARES).files["train"]
    assert [file.name for file in rest] == [name for name in names if name != names[5]]


LAYOUTS = {
    VOC: (["JPEGImages", "Annotations", "ImageSets/Main"], "host.robots.ox.ac.uk", "pictures=voc"),
    COCO: (["val2017", "annotations/person_keypoints_val2017.json"], "cocodataset.org", "pictures=coco"),
    DAVIS: (["JPEGImages/480p", "Annotations/480p"], "davischallenge.org", "pictures=davis"),
    CelebAHQ: (["CelebA-HQ-img", "identity_CelebA.txt"], "CelebAMask-HQ.*mmlab", "pictures=celeba_hq"),
}


@pytest.mark.parametrize("source", LAYOUTS)
def test_a_missing_data_set_says_where_it_is_from_and_how_to_go_on(tmp_path, source):
    tree, page, command = LAYOUTS[source]
    with pytest.raises(ValueError, match=f"pictures.path={tmp_path}: .*{page}.*data_prep.prepare .*{command}") as error:
        source(path=str(tmp_path), resolution=32)
    assert all(name in str(error.value) for name in tree)
    if "." not in tree[0]:
        (tmp_path / tree[0]).mkdir(parents=True)
    with pytest.raises(ValueError, match="found no [^:]*(Anno|person_key|mapping)"):
        source(path=str(tmp_path), resolution=32)


@pytest.fixture
def coco(tmp_path):
    """Thirty images of 60 x 40; odd ones show a person, of which two are a crowd or have no keypoint."""
    annotations = []
    for number in range(30):
        save(tmp_path / f"val2017/{number:012}.jpg", (60, 40))
        if number % 2:
            points = [[10 + number, k, (0, 1, 2)[k % 3]] for k in range(17)]
            record = {
                "image_id": number,
                "keypoints": np.ravel(points).tolist(),
                "num_keypoints": 11,
                "iscrowd": int(number == 1),
            }
            annotations.append(record | ({"num_keypoints": 0} if number == 3 else {}))
    annotations.append(annotations[-1])
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in range(30)]
    captions = [{"image_id": number, "caption": f"a person\n {number}."} for number in range(30) for _ in "ab"]
    (tmp_path / "annotations").mkdir()
    for name, records in (("person_keypoints", annotations), ("captions", captions)):
        path = tmp_path / f"annotations/{name}_val2017.json"
        path.write_text(json.dumps({"images": images, "annotations": records}))
    return tmp_path


def test_coco_gives_random_images_of_people_with_their_keypoints(coco):
    source = COCO(path=str(coco), images=6, resolution=40)
    assert (source.count("test"), source.count("train"), source.count("val")) == (6, 0, 0)
    samples = source.read("test", range(6))
    numbers = [int(sample.file.stem) for sample in samples]
    assert all(number % 2 and number > 3 for number in numbers) and numbers != sorted(numbers)
    again = COCO(path=str(coco), images=6, resolution=40).files["test"]
    assert again == source.files["test"] != COCO(path=str(coco), images=6, resolution=40, seed=1).files["test"]
    for sample, number in zip(samples, numbers, strict=True):
        assert sample.prompt == f"a person {number}." and len(sample.keypoints) == (2 if number == 29 else 1)
        nose, right_hip = (sample.keypoints[0, KEYPOINTS.index(name)] for name in ("nose", "right_hip"))
        # 60 x 40 loses ten columns on the left; keypoints 0 and 12 have a visibility of 0, keypoint 2, an eye, of 2.
        assert nose[:2].tolist() == right_hip[:2].sub(torch.tensor([0, 12])).tolist() == [number, 0]
        seen = sample.keypoints[0, :, 2]
        assert not nose[2] and seen[KEYPOINTS.index("right_eye")] and seen[KEYPOINTS.index("left_shoulder")]
    (label, *_) = ExactPose(line_width=2).annotate(samples)
    assert label.image.any() and torch.equal(label.keypoints, samples[0].keypoints)


def test_coco_without_enough_people_or_with_other_records_is_one_clear_error(coco):
    with pytest.raises(ValueError, match=r"pictures.images=14: .*found 13"):
        COCO(path=str(coco), images=14, resolution=40)
    (coco / "annotations/person_keypoints_val2017.json").write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"person_keypoints_val2017.json: .*annotations"):
        COCO(path=str(coco), images=1, resolution=40)


def test_davis_gives_pairs_of_frames_with_the_masks_of_its_objects(tmp_path):
    for video in ("bear", "camel"):
        for number in range(5):
            save(tmp_path / f"DAVIS/JPEGImages/480p/{video}/{number:05}.jpg", (64, 48), seed=number)
            mask = np.zeros((48, 64), np.uint8)
            mask[10:30, 20:40] = 1 + number % 2
            image = Image.fromarray(mask, "P")
            image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
            path = tmp_path / f"DAVIS/Annotations/480p/{video}/{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    source = DAVIS(path=str(tmp_path), resolution=48, pairs=3, clips=True, gaps=(2, 23), **SHARES)
    assert source.count("train") == 6
    for clip in source.read("train", range(6)):
        assert not isinstance(clip, Skip) and len(clip.images) >= 3
        wanted = torch.zeros(48, 48, dtype=torch.bool)
        wanted[10:30, 12:32] = True
        assert torch.equal(clip.mask, wanted)


@pytest.fixture
def celeba(tmp_path):
    """Six faces: of persons 7, 7, 8, 9, 8 and one whom nobody knows."""
    root = tmp_path / "CelebAMask-HQ"
    for number in range(6):
        save(root / f"CelebA-HQ-img/{number}.jpg", (50, 50), level=40 * number)
    rows = [f"{number} {number + 100} {number + 101:06}.jpg" for number in range(6)]
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text("idx orig_idx orig_file\n" + "\n".join(rows))
    known = [f"{number + 101:06}.jpg {person}" for number, person in enumerate((7, 7, 8, 9, 8))]
    (root / "identity_CelebA.txt").write_text("\n".join(known))
    return root


def test_celeba_pairs_the_images_of_one_person_and_crops_the_face(celeba):
    source = CelebAHQ(path=str(celeba.parent), resolution=30, pairs=2, gaps=(1, 1000), **SHARES)
    assert {person: [file.stem for file in files] for person, files in source.frames.items()} == {
        "7": ["0", "1"],
        "8": ["2", "4"],
    }
    image = np.zeros((50, 50, 3), np.uint8)
    image[14:44, 10:40] = 200
    assert [round(50 * share) for share in FACE] == [10, 14, 40, 44]
    for name in ("0", "1"):
        Image.fromarray(image).save(celeba / f"CelebA-HQ-img/{name}.jpg", format="PNG")
    group = next(g for g in source.read("train", range(4)) if g.name.startswith("7,"))
    assert group.images.shape == (2, 3, 30, 30) and (group.images == 200).all()


def test_celeba_tables_that_fit_nothing_are_one_clear_error(celeba):
    (celeba / "identity_CelebA.txt").write_text("000101.jpg 7\n000102.jpg\n")
    with pytest.raises(ValueError, match=r"identity_CelebA.txt: .*2 words.*000102.jpg"):
        CelebAHQ(path=str(celeba), resolution=30)
    (celeba / "identity_CelebA.txt").write_text("000101.jpg 7\n000102.jpg 8\n")
    with pytest.raises(ValueError, match="two images or more, found none"):
        CelebAHQ(path=str(celeba), resolution=30)


@pytest.fixture
def videos(tmp_path):
    """Two videos of eight frames that brighten by 20 levels each."""
    for name in ("a", "sub/b"):
        path = tmp_path / f"{name}.avi"
        path.parent.mkdir(exist_ok=True)
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (48, 32))
        for number in range(8):
            writer.write(np.full((32, 48, 3), 20 * number, np.uint8))
        writer.release()
    (tmp_path / "sub/b.txt").write_text("it grows brighter")
    return tmp_path


def test_files_of_videos_give_pairs_of_their_frames(videos):
    settings = {"path": str(videos), "resolution": 32, "pairs": 3, "gaps": (2, 4), "prompt": "a clip", **SHARES}
    source = VideoFileSource(**settings, clips=True)
    assert list(source.frames) == ["a", "sub/b"] and source.count("train") == 6
    groups = source.read("train", range(6))
    assert [group.prompt for group in groups] == ["a clip"] * 3 + ["it grows brighter"] * 3
    for group in groups:
        first, last = (int(word) for word in group.name.replace(",", "").split() if word.isdigit())
        assert len(group.images) == last - first + 1 >= 3
        levels = group.images.float().mean((1, 2, 3))
        assert (levels - 20 * torch.arange(first, last + 1)).abs().max() < 4
    pairs = VideoFileSource(**settings).read("train", range(6))
    assert all(torch.equal(pair.images, group.images[[0, -1]]) for pair, group in zip(pairs, groups, strict=True))


def test_what_is_no_video_is_skipped_by_name_or_one_clear_error(videos, tmp_path):
    (videos / "a.avi").write_text("#EXTM3U\n/etc/hostname\n")
    source = VideoFileSource(path=str(videos), resolution=32, pairs=1, gaps=(2, 4), **SHARES)
    first, second = source.read("train", range(2))
    assert isinstance(first, Skip) and "a.avi" in first.reason and "video" in first.reason
    assert not isinstance(second, Skip)
    with pytest.raises(ValueError, match=r"pictures.path=.*nowhere: .*mp4.*none"):
        VideoFileSource(path=str(tmp_path / "nowhere"), resolution=32)
    with pytest.raises(ValueError, match=r"pictures.masks="):
        VideoFileSource(path=str(videos), resolution=32, masks=str(videos))


def test_a_data_set_goes_on_until_enough_images_have_a_label(voc, tiny_pipeline, tmp_path):
    """Half of the images show no edge; with `fill`, six labels take more than six images."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    images = voc / "VOCdevkit/VOC2012/JPEGImages"
    for number in range(0, 12, 2):
        save(images / f"2007_{number:06}.jpg", seed=number)
    recipe = {
        "source": {"_target_": "data_prep.sources.datasets.VOC", "path": str(voc), "resolution": 32, **SHARES},
        "annotator": {"_target_": "data_prep.annotators.edges.Canny"},
        "backbone": {"_target_": "rg.backbone.DiffusionBackbone.from_pretrained", "path": str(tmp_path / "model")},
        "shard_size": 4,
    }
    found = build(root=str(tmp_path / "filled"), n=5, fill=True, **recipe)
    assert len(found.indices()) >= 5 and found.skipped and len(read_shards(tmp_path / "filled/train", 5)) == 5
    plain = build(root=str(tmp_path / "plain"), n=5, **recipe)
    assert len(plain.indices()) + len(plain.skipped) == 5
    # Nobody is left to ask for more; and what is whole needs no annotator.
    everything = build(root=str(tmp_path / "filled"), n=12, fill=True, **recipe)
    assert len(everything.indices()) == 6 and len(everything.skipped) == 6
    labels = {"_target_": "data_prep.annotators.files.FileLabels", "path": None}
    assert build(root=str(tmp_path / "filled"), n=12, fill=True, labels=labels, **recipe) == everything
