import io
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from rg.data.datamodule import ShuffledEpochs
from rg.data.samples import DataError, Group, Groups, Sample, Samples, to_png
from rg.data.shards import Manifest, read_shards

SHARD = Path("shard-000000.tar")
IMAGE = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
SAMPLE = Sample(
    index=7,
    image=to_png(IMAGE),
    label=to_png(255 - IMAGE),
    size=(4, 4),
    keypoints=torch.linspace(-1, 5, 18 * 3).view(1, 18, 3),
    latent=torch.linspace(-2, 2, 32).view(8, 2, 2).half(),
    prompt="a person ünder a tree",
    kind="one",
    seed=(1, 0, 7),
    identity=[{"hat": None}],
)
POINTS = torch.tensor([[[0.0, 1.0, 1.0], [2.5, 3.0, 1.0]], [[1.0, 1.0, 0.0], [-9.0, 3.0, 1.0]]])
IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
GROUP = Group(
    index=7,
    images=tuple(map(to_png, IMAGES)),
    size=(4, 4),
    points=POINTS,
    turn=12.5,
    latents=torch.linspace(-2, 2, 64).view(2, 8, 2, 2).half(),
    prompt="a person ünder a tree",
    kind="portrait",
    seed=(1, 0, 7),
    identity=[{"hat": None}],
)
RECORDS = (SAMPLE, GROUP, replace(GROUP, points=torch.zeros(0, 2, 3), turn=None, seed=None))


def as_npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def as_png(mode, size):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format="PNG")
    return stream.getvalue()


@pytest.mark.parametrize("record", RECORDS)
def test_decode_is_the_inverse_of_encode(record):
    back = type(record).decode(record.encode(), SHARD)
    for name, value in vars(record).items():
        found = getattr(back, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


@pytest.mark.parametrize(
    ("record", "member"),
    [
        *((SAMPLE, member) for member in ("image.png", "label.png", "json", "latent.npy")),
        *((GROUP, member) for member in ("0.png", "1.png", "json", "latent.npy")),
    ],
)
def test_missing_member_is_named(record, member):
    raw = record.encode()
    del raw[member]
    with pytest.raises(DataError, match=f"sample 00000007 .*'{member}'.*only"):
        type(record).decode(raw, SHARD)


@pytest.mark.parametrize(
    ("member", "data", "words"),
    [
        ("image.png", b"no image", "cannot identify"),
        ("label.png", as_png("RGB", (4, 5)), r"RGB .*\(4, 4\).*RGB .*\(5, 4\)"),
        ("label.png", as_png("L", (4, 4)), r"RGB .*\(4, 4\).* L of"),
        ("latent.npy", as_npy(np.zeros((8, 2, 2), np.float32)), r"float16 .*\(2C, h, w\).* float32"),
        ("latent.npy", as_npy(np.array([print]), allow_pickle=True), "float16 .* object"),
        ("json", b"{", "Expecting property name"),
        ("json", b'{"keypoints": [[1, 2, 3]]}', r"keypoints\.0\.0: .*list, found 1"),
    ],
)
def test_damaged_member_is_named(member, data, words):
    with pytest.raises(DataError, match=f"{member} of sample 00000007 .*{words}"):
        Sample.decode(SAMPLE.encode() | {member: data}, SHARD)


def meta(**changed):
    return json.dumps(json.loads(SAMPLE.encode()["json"]) | changed).encode()


def of_claimed_shape(shape):
    """An array of 32 numbers whose header says that there are more."""
    return as_npy(np.zeros((8, 2, 2), np.float16)).replace(b"(8, 2, 2), }", f"{shape}, }}".encode().ljust(12))


@pytest.mark.parametrize(
    ("member", "data", "words"),
    [
        ("json", meta(seed="7"), "seed: .*list, found '7'"),
        ("json", meta(size=[4, 0]), r"size\.1: .*1, found 0"),
        ("json", meta(identity=[None]), r"identity\.0: .*dict.*, found None"),
        ("json", meta(keypoints=[[[float("nan"), 1, 1]] * 18]), r"keypoints\.0\.0\.0: .*found nan"),
        ("json", b"[" * 20_000, "levels, found 20,000"),
        ("latent.npy", of_claimed_shape((8, 2, 9)), r"288 bytes of \(8, 2, 9\), found 64"),
        ("latent.npy", of_claimed_shape((8, 9**9, 99)), r"bytes of .*387420489.*, found "),
        ("latent.npy", as_npy(np.full((2, 1, 1), np.inf, np.float16)), "finite latents"),
        ("latent.npy", as_npy(np.zeros((2, 0, 1), np.float16)), r"float16 .* \(2, 0, 1\)"),
    ],
)
def test_what_a_member_says_is_checked_before_it_is_used(member, data, words):
    with pytest.raises(DataError, match=f"{member} of sample 00000007 .*{words}"):
        Sample.decode(SAMPLE.encode() | {member: data}, SHARD)


def test_a_hidden_keypoint_of_a_sample_may_be_nan():
    keypoints = [[[float("nan"), None, 0]] + [[1, 2, 1]] * 17]
    back = Sample.decode(SAMPLE.encode() | {"json": meta(keypoints=keypoints)}, SHARD)
    assert back.keypoints[0, 0].tolist() == [0, 0, 0] and back.keypoints[0, 1].tolist() == [1, 2, 1]


def test_members_of_other_names_are_not_looked_at():
    assert Sample.decode(SAMPLE.encode() | {"weights.pth": b"\x80\x04."}, SHARD).index == 7


def test_samples_in_memory():
    nobody = Sample(**{**vars(SAMPLE), "keypoints": torch.zeros(0, 18, 3), "index": 9})
    both = Samples.stack([SAMPLE, nobody])
    assert len(both) == 2
    first, second = both[0], both[1]
    assert first["image"].dtype == torch.float32
    torch.testing.assert_close(first["image"], IMAGE / 255 * 2 - 1)
    torch.testing.assert_close(first["label"], (255 - IMAGE) / 255 * 2 - 1)
    assert torch.equal(first["latent_mean"], SAMPLE.latent[:4].float())
    assert torch.equal(first["latent_std"], SAMPLE.latent[4:].float())
    assert torch.equal(first["keypoints"], SAMPLE.keypoints)
    assert second["keypoints"].shape == (1, 18, 3) and not second["keypoints"].any()
    assert (int(second["index"]), second["epoch"], second["prompt"]) == (9, 0, SAMPLE.prompt)


def test_8500_samples_of_512_pixels_fit_in_8_gb():
    """Photographs, which PNG makes a third smaller, with drawings of poses and latents of Stable Diffusion."""
    rng = np.random.default_rng(0)
    photo = np.stack(np.meshgrid(*[np.linspace(0, 200, 512)] * 2)).mean(0)[..., None] + rng.normal(0, 8, (512, 512, 3))
    label = torch.zeros(3, 512, 512, dtype=torch.uint8)
    label[0, 100:400, 250:254] = 255
    image = to_png(torch.from_numpy(photo.clip(0, 255).astype(np.uint8)).permute(2, 0, 1))
    latent = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0)).half()
    sample = replace(SAMPLE, image=image, label=to_png(label), size=(512, 512), latent=latent)
    raw = sample.encode()
    del sample, image
    tracemalloc.start()
    # Bytes of its own for each, as from a file.
    raws = [{key: bytes(bytearray(v)) if key != "__key__" else v for key, v in raw.items()} for _ in range(3)]
    read = Samples.stack([Sample.decode(one, SHARD) for one in raws])
    del raws
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read.nbytes * 8500 / 3 < 8e9
    assert held < read.nbytes, (
        "nothing decoded is kept: Python's memory is that of the PNGs, and torch's of the latents"
    )
    assert read.nbytes < held + read.latent.nbytes + 20_000
    assert torch.equal(read[2]["label"], label / 127.5 - 1) and read[0]["image"].shape == (3, 512, 512)


def test_several_samples_are_those_that_one_gets_one_by_one():
    samples = Samples.stack([replace(SAMPLE, index=index, image=to_png(IMAGE + index)) for index in range(5)])
    for row, place in zip(samples.__getitems__([3, 0, 3]), (3, 0, 3), strict=True):
        assert torch.equal(row["image"], (IMAGE + place) / 127.5 - 1) and int(row["index"]) == place
    assert [int(row["index"]) for row in samples.take([4, 1])] == [4, 1]
    assert torch.equal(samples.take([4, 1]).decoded(), torch.stack([IMAGE + 4, IMAGE + 1]))


def test_points_that_no_two_images_share_are_refused():
    hidden = replace(GROUP, points=POINTS * torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(DataError, match=r"shard-000000.tar: json of sample 00000007 .* visible in all images"):
        Group.decode(hidden.encode(), SHARD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pictures": 0}, "pictures: .*1, found 0"),
        ({"pictures": 3}, r"points\.0: .* 3 images, found 2"),
        ({"turn": -1}, "turn.*0, found -1"),
        ({"points": [[[1, 2, 1], [1, float("nan"), 1]]]}, r"points\.0\.1\.1: .*found nan"),
    ],
)
def test_what_the_json_of_a_group_says_is_checked(change, words):
    raw = GROUP.encode()
    raw["json"] = json.dumps(json.loads(raw["json"]) | change).encode()
    with pytest.raises(DataError, match=f"json of sample 00000007 .*{words}"):
        Group.decode(raw, SHARD)


def test_latents_of_another_number_of_images_are_refused():
    raw = replace(GROUP, latents=GROUP.latents[:1, :6]).encode()
    with pytest.raises(DataError, match="latent.npy of sample 00000007 .*latents of 2"):
        Group.decode(raw, SHARD)


def test_groups_in_memory():
    fewer = replace(GROUP, index=9, points=POINTS[:1], turn=None)
    both = Groups.stack([GROUP, fewer])
    first, second = both[0], both[1]
    torch.testing.assert_close(first["image"], IMAGES / 255 * 2 - 1)
    assert torch.equal(first["latent_mean"], GROUP.latents[:, :4].float())
    assert torch.equal(first["latent_std"], GROUP.latents[:, 4:].float())
    assert torch.equal(first["points"], POINTS)
    assert torch.equal(second["points"][:1], POINTS[:1]) and not second["points"][1:].any()
    assert first["turn"] == 12.5 and second["turn"].isnan()
    assert (int(second["index"]), second["epoch"], second["prompt"]) == (9, 0, GROUP.prompt)


@pytest.mark.parametrize("kind", ["group", None])
def test_shards_of_groups_are_read_like_those_of_images(tmp_path, kind):
    groups = [replace(GROUP, index=index, prompt=str(index)) for index in range(3)]
    with TarWriter(str(tmp_path / SHARD), encoder=False, mtime=0) as writer:
        for group in groups:
            writer.write(group.encode())
    Manifest("train", {}, "a" * 16, {}, {SHARD.name: {"start": 0, "stop": 3, "samples": 3}}, kind=kind).write(tmp_path)
    read = read_shards(tmp_path, 2)
    assert (
        isinstance(read, Groups)
        and read.prompt == ["0", "1"]
        and torch.equal(read.decoded(), IMAGES.expand(2, -1, -1, -1, -1))
    )
    epochs = ShuffledEpochs(samples=read, seed=0)
    assert [epochs[position]["epoch"] for position in range(4)] == [0, 0, 1, 1]
    larger = replace(groups[2], images=(SAMPLE.image,) * 3, points=torch.zeros(0, 3, 3))
    with TarWriter(str(tmp_path / SHARD), encoder=False, mtime=0) as writer:
        for group in [*groups[:2], replace(larger, latents=torch.zeros(3, 8, 2, 2).half())]:
            writer.write(group.encode())
    with pytest.raises(DataError, match="one size"):
        read_shards(tmp_path)
