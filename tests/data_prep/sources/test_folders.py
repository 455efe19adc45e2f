import io
import json
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.annotators.files import FileLabels
from data_prep.annotators.rendered import ExactPose
from data_prep.cropping import crop_box, crop_image, crop_points
from data_prep.records import Skip
from data_prep.sources.folders import FolderSource, split_by_hash
from data_prep.sources.marionette import MarionetteSource
from rg.points import draw_skeletons


def save(path, size, squares=(), mode="RGB"):
    """A black image of (height, width) with one white pixel at each (x, y)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new(mode, size[::-1])
    for place in squares:
        image.putpixel(place, (255, 255, 255))
    image.save(path, lossless=True)


def person(**places):
    """One person whose keypoints are invisible but for k0=(x, y), k1=..."""
    keypoints = [[0.0, 0.0, 0.0] for _ in range(18)]
    for name, (x, y) in places.items():
        keypoints[int(name[1:])] = [x, y, 1.0]
    return keypoints


@pytest.fixture
def images(tmp_path):
    return tmp_path / "images"


@pytest.fixture
def labels(tmp_path):
    (tmp_path / "labels").mkdir()
    return tmp_path / "labels"


def folder(images, resolution=4):
    return FolderSource(path=str(images), resolution=resolution, validation_share=0, test_share=0)


def read_all(source):
    return source.read("train", range(source.count("train")))


def label_all(source, labels, **options):
    samples = [item for item in read_all(source) if not isinstance(item, Skip)]
    return FileLabels(path=str(labels), **options).annotate(samples)


def test_folder_is_read_sorted_by_name(images):
    for name in ("b/z.PNG", "a.webp", "b/c.jpg", "b.jpeg"):
        save(images / name, (6, 6))
    (images / "notes.md").write_text("no image")
    assert [item.file.as_posix() for item in read_all(folder(images))] == ["a.webp", "b.jpeg", "b/c.jpg", "b/z.PNG"]


@pytest.mark.parametrize(("size", "box"), [((8, 12), (2, 0, 8)), ((13, 8), (0, 2, 8)), ((8, 8), (0, 0, 8))])
def test_centre_square(size, box):
    assert crop_box(size) == box


def test_image_and_keypoints_are_cropped_and_resized_alike(images, labels):
    # 8 x 12 pixels: the square is x 2..9. Pixel (6, 3) becomes (4, 3) of 8 x 8, and a quarter of pixel (2, 1) of 4 x 4.
    save(images / "a.png", (8, 12), [(6, 3)])
    (labels / "a.json").write_text(json.dumps({"keypoints": [person(k0=(6, 3), k1=(1, 3), k2=(1.5, -0.5))]}))
    sample = read_all(folder(images))[0]
    expected = torch.zeros(3, 4, 4, dtype=torch.uint8)
    expected[:, 1, 2] = 64
    assert torch.equal(sample.image, expected) and sample.original == (8, 12)
    label = label_all(folder(images), labels)[0]
    assert label.keypoints[0, 0].tolist() == [(4 + 0.5) / 2 - 0.5, (3 + 0.5) / 2 - 0.5, 1]
    assert label.keypoints[0, 1, 2] == 0, "left of the square"
    assert label.keypoints[0, 2].tolist() == [-0.5, -0.5, 1], "the square's own corner"


def test_centre_of_mass_follows_the_keypoint():
    keypoints = torch.tensor([person(k0=(21, 13))])
    image = Image.new("RGB", (31, 24))
    image.putpixel((21, 13), (255, 255, 255))
    small = crop_image(image, 7)[0]
    x, y, visible = crop_points(keypoints, (24, 31), 7)[0, 0]
    assert visible == 1
    assert small[round(float(y)), round(float(x))] == small.max() > 0


def test_png_label_is_cropped_as_the_image(images, labels):
    save(images / "a" / "b.jpg", (8, 12))
    save(labels / "a" / "b.png", (8, 12), [(6, 3)])
    label = label_all(folder(images, 8), labels)[0]
    assert label.image[:, 3, 4].tolist() == [255, 255, 255] and label.image.sum() == 3 * 255
    assert label.keypoints.shape == (0, 18, 3)


def test_skeleton_is_drawn_where_there_is_only_json(images, labels):
    save(images / "a.png", (16, 16))
    (labels / "a.json").write_text(json.dumps({"keypoints": [person(k0=(8, 4), k1=(8, 9))]}))
    label = label_all(folder(images, 16), labels, line_width=3.0)[0]
    drawn = draw_skeletons(label.keypoints[None], (16, 16), (16, 16), 3.0)[0]
    assert torch.equal(label.image, (drawn * 255).round().byte()) and label.image.any()
    save(labels / "a.png", (16, 16))
    label = label_all(folder(images, 16), labels)[0]
    assert not label.image.any() and len(label.keypoints) == 1


def test_images_of_16_bits_keep_their_levels(images, labels):
    save(images / "a.png", (4, 4))
    levels = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)  # 0, 1/15, ..., 1 of 65535
    Image.fromarray(levels).save(labels / "a.png")
    label = label_all(folder(images), labels)[0]
    assert label.image[0].flatten().tolist() == [17 * i for i in range(16)]
    assert (label.image == label.image[0]).all()


def test_nothing_is_drawn_without_a_line_width(images, labels):
    save(images / "a.png", (16, 16))
    (labels / "a.json").write_text(json.dumps({"keypoints": [person(k0=(8, 4), k1=(8, 9))]}))
    (skip,) = label_all(folder(images, 16), labels, line_width=None)
    assert (
        skip.reason.startswith("a.png ") and f"pictures.labels={labels}: " in skip.reason and "json" not in skip.reason
    )


def test_prompt_is_the_text_beside_the_image(images):
    save(images / "a.png", (4, 4))
    save(images / "b.png", (4, 4))
    (images / "b.txt").write_text("two cats\n")
    assert [item.prompt for item in read_all(folder(images))] == ["", "two cats"]


def test_unreadable_images_are_skipped_by_name(images):
    save(images / "a.png", (40, 40))
    (images / "b.png").write_bytes((images / "a.png").read_bytes()[:50])
    (images / "c.jpg").write_text("no image")
    read = read_all(folder(images))
    assert [isinstance(item, Skip) for item in read] == [False, True, True]
    assert read[1].reason.startswith("b.png cannot be read: ") and read[2].reason.startswith("c.jpg cannot be read: ")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, None, "a.jpg .*pictures.labels=.*/labels: .*a.png.* a.json.* none"),
        ("a.png", (8, 11), r"a.png: .*\(8, 12\).*\(8, 11\)"),
        ("a.png", b"no image", "a.jpg has no label .*a.png: expected an image"),
        ("a.json", b"{", "a.jpg has no label .*a.json: expected JSON"),
        ("a.json", b"{}", "a.json: keypoints: expected this key, found none"),
        ("a.json", b'{"keypoints": [[[1, 2, 1]]]}', r"a.json: keypoints\.0: expected .*18.*, found \[\[1, 2, 1\]\]"),
        (
            "a.json",
            json.dumps({"keypoints": [person(k3=(float("nan"), 1))]}).encode(),
            r"keypoints\.0\.3\.0: .* found nan",
        ),
    ],
)
def test_bad_labels_are_skipped_with_a_reason(images, labels, name, content, words):
    save(images / "a.jpg", (8, 12))
    if isinstance(content, bytes):
        (labels / name).write_bytes(content)
    elif name:
        save(labels / name, content)
    skip = label_all(folder(images), labels)[0]
    assert isinstance(skip, Skip)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(skip.reason)


def test_a_folder_that_passed_through_other_systems_has_the_images_that_it_had(images, tmp_path):
    save(tmp_path / "linked" / "e.png", (4, 4))
    for name in ("a.png", "b/c.png", "._a.png", ".ipynb_checkpoints/a-checkpoint.png", "__MACOSX/._a.png"):
        save(images / name, (4, 4))
    (images / "sub").symlink_to(tmp_path / "linked")
    (images / "b" / "up").symlink_to(images)
    os.mkfifo(images / "pipe.png")
    assert [item.file.as_posix() for item in read_all(folder(images))] == ["a.png", "b/c.png", "sub/e.png"]


def test_images_are_counted_as_people_count(images):
    for number in (0, 1, 2, 9, 10, 11):
        save(images / f"frame{number}.png", (4, 4))
    assert [item.file.stem[5:] for item in read_all(folder(images))] == ["0", "1", "2", "9", "10", "11"]


def test_two_images_that_share_the_name_of_a_label_are_both_named(images):
    for name in ("a.png", "sub/a.jpg", "b.webp"):
        save(images / name, (4, 4))
    assert folder(images).count("train") == 3
    save(images / "sub" / "a.PNG", (4, 4))
    with pytest.raises(ValueError, match=rf"pictures\.path={images}: .* one .* sub/a\.PNG and sub/a\.jpg"):
        folder(images)


def test_a_photograph_with_odd_exif_data_is_read_and_turned(images):
    images.mkdir()
    stream = io.BytesIO()
    Image.new("RGB", (60, 40)).save(stream, "JPEG")
    turn = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    entries = struct.pack("<H", 2) + turn + struct.pack("<HHII", 0x011A, 10, 1, 38) + bytes(4)  # a signed resolution
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + struct.pack("<ii", -5, 3)
    marker = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (images / "a.jpg").write_bytes(stream.getvalue()[:2] + marker + stream.getvalue()[2:])
    assert read_all(folder(images))[0].original == (60, 40)


def test_marks_at_the_beginning_of_captions_and_labels_are_no_part_of_them(images, labels):
    save(images / "a.png", (16, 16))
    (images / "a.txt").write_text("a person on grass\n", encoding="utf-8-sig")
    content = json.dumps({"keypoints": [person(k0=(8, 4))]})
    (labels / "a.json").write_text(content, encoding="utf-8-sig")
    assert read_all(folder(images, 16))[0].prompt == "a person on grass"
    assert label_all(folder(images, 16), labels)[0].keypoints[0, 0].tolist() == [8, 4, 1]


def test_what_lies_under_a_transparent_label_does_not_count(images, labels):
    save(images / "a.png", (4, 4))
    levels = np.full((4, 4, 4), (255, 255, 255, 0), np.uint8)
    levels[1, 2] = (255, 0, 0, 255)
    Image.fromarray(levels).save(labels / "a.png")
    image = label_all(folder(images), labels, line_width=None)[0].image
    assert image[:, 1, 2].tolist() == [255, 0, 0] and image.sum() == 255


def test_a_name_that_is_no_text_is_read_and_skipped_like_others(images):
    for name in (b"\xff.png", b"\xfe.png"):
        save(images / os.fsdecode(name), (4, 4))
    (images / os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    first, second = read_all(folder(images))
    assert first.reason.encode().startswith("\ufffd.png cannot be read".encode()) and not isinstance(second, Skip)


def test_split_of_an_image_depends_on_its_name_and_the_seed_only(images):
    for number in range(300):
        save(images / f"{number}.png", (1, 1))

    def splits(**options):
        source = FolderSource(path=str(images), resolution=4, **options)
        return {file.name: split for split, files in source.files.items() for file in files}

    before = splits()
    counts = {split: list(before.values()).count(split) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 300 and 210 < counts["train"] < 270 and 15 < counts["val"] < 50
    assert splits(seed=1) != before
    for number in range(0, 300, 2):
        (images / f"{number}.png").unlink()
    assert splits().items() <= before.items()
    assert set(splits(validation_share=1, test_share=0).values()) == {"val"}


def test_another_set_of_names_is_another_description(images):
    save(images / "a.png", (4, 4))
    before = folder(images).describe("train")
    assert folder(images).describe("train") == before
    save(images / "b.png", (4, 4))
    assert folder(images).describe("train") != before


def test_bad_arguments(images, tmp_path):
    with pytest.raises(ValueError, match=rf"pictures\.path={images}: .*folder.* none"):
        folder(images)
    with pytest.raises(ValueError, match=rf"pictures\.labels={tmp_path}/none: .*folder.* none"):
        FileLabels(path=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"at most 1.*validation_share=0\.9, test_share=0\.2"):
        save(images / "a.png", (4, 4))
        FolderSource(path=str(images), resolution=4, validation_share=0.9, test_share=0.2)


def test_marionette_splits_differ_and_batches_do_not_matter():
    source = MarionetteSource(seed=3, resolution=16, kinds={"one": 0.5, "two": 0.5})
    assert source.count("train") is None
    whole = source.read("train", range(6))
    assert torch.equal(source.read("train", [4])[0].image, whole[4].image)
    assert not torch.equal(source.read("val", [4])[0].image, whole[4].image)
    assert [item.seed for item in source.read("search", [0, 9])] == [(3, 2, 0), (3, 2, 9)]
    people = {item.kind: len(item.keypoints) for item in whole}
    assert people == {"one": 1, "two": 2}
    labels = ExactPose(line_width=1.5).annotate(whole)
    for item, label in zip(whole, labels, strict=True):
        drawn = draw_skeletons(item.keypoints[None], (16, 16), (16, 16), 1.5)[0]
        assert torch.equal(label.image, (drawn * 255).round().byte())
        assert torch.equal(label.keypoints, item.keypoints)


@pytest.mark.parametrize("count", range(2, 12))
def test_two_or_more_names_leave_one_to_train_on_and_another_to_validate_with(count):
    names = [f"{number}.png" for number in range(count)]
    for seed in range(60):
        splits = split_by_hash(names, validation_share=0.1, test_share=0.1, seed=seed)
        assert splits["train"] and len(splits["train"]) + len(splits["val"]) >= 2
        assert sorted(name for part in splits.values() for name in part) == sorted(names)
        assert all(part == [name for name in names if name in part] for part in splits.values())
    everything = split_by_hash(names, validation_share=0, test_share=1, seed=0)
    assert everything["test"] == names
