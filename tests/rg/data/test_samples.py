import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from webdataset import TarWriter

from rg.data.datamodule import ShuffledEpochs
from rg.data.samples import DataError, Group, Groups, Sample, Samples
from rg.data.shards import Manifest, read_shards

SHARD = Path("shard-000000.tar")
SAMPLE = Sample(
    index=7,
    image=torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4),
    label=255 - torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4),
    keypoints=torch.linspace(-1, 5, 18 * 3).view(1, 18, 3),
    latent=torch.linspace(-2, 2, 32).view(8, 2, 2).half(),
    prompt="a person ünder a tree",
    kind="one",
    seed=(1, 0, 7),
    identity=[{"hat": None}],
)
POINTS = torch.tensor([[[0.0, 1.0, 1.0], [2.5, 3.0, 1.0]], [[1.0, 1.0, 0.0], [-9.0, 3.0, 1.0]]])
GROUP = Group(
    index=7,
    images=torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4),
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
        ("latent.npy", as_npy(np.array([print]), allow_pickle=True), "allow_pickle=False"),
        ("json", b"{", "Expecting property name"),
        ("json", b'{"keypoints": [[1, 2, 3]]}', "shape"),
    ],
)
def test_damaged_member_is_named(member, data, words):
    with pytest.raises(DataError, match=f"{member} of sample 00000007 .*{words}"):
        Sample.decode(SAMPLE.encode() | {member: data}, SHARD)


def test_members_of_other_names_are_not_looked_at():
    assert Sample.decode(SAMPLE.encode() | {"weights.pth": b"\x80\x04."}, SHARD).index == 7


def test_samples_in_memory():
    nobody = Sample(**{**vars(SAMPLE), "keypoints": torch.zeros(0, 18, 3), "index": 9})
    both = Samples.stack([SAMPLE, nobody])
    assert len(both) == 2
    first, second = both[0], both[1]
    assert first["image"].dtype == torch.float32
    torch.testing.assert_close(first["image"], SAMPLE.image / 255 * 2 - 1)
    torch.testing.assert_close(first["label"], SAMPLE.label / 255 * 2 - 1)
    assert torch.equal(first["latent_mean"], SAMPLE.latent[:4].float())
    assert torch.equal(first["latent_std"], SAMPLE.latent[4:].float())
    assert torch.equal(first["keypoints"], SAMPLE.keypoints)
    assert second["keypoints"].shape == (1, 18, 3) and not second["keypoints"].any()
    assert (int(second["index"]), second["epoch"], second["prompt"]) == (9, 0, SAMPLE.prompt)


def test_points_that_no_two_images_share_are_refused():
    hidden = replace(GROUP, points=POINTS * torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(DataError, match=r"shard-000000.tar: json of sample 00000007 .* visible in all images"):
        Group.decode(hidden.encode(), SHARD)


def test_latents_of_another_number_of_images_are_refused():
    raw = replace(GROUP, latents=GROUP.latents[:1, :6]).encode()
    with pytest.raises(DataError, match="latent.npy of sample 00000007 .*latents of 2"):
        Group.decode(raw, SHARD)


def test_groups_in_memory():
    fewer = replace(GROUP, index=9, points=POINTS[:1], turn=None)
    both = Groups.stack([GROUP, fewer])
    first, second = both[0], both[1]
    torch.testing.assert_close(first["image"], GROUP.images / 255 * 2 - 1)
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
    assert isinstance(read, Groups) and read.prompt == ["0", "1"] and read.image.shape == (2, 2, 3, 4, 4)
    epochs = ShuffledEpochs(samples=read, seed=0)
    assert [epochs[position]["epoch"] for position in range(4)] == [0, 0, 1, 1]
    larger = replace(groups[2], images=torch.zeros(3, 3, 4, 4).byte(), points=torch.zeros(0, 3, 3))
    with TarWriter(str(tmp_path / SHARD), encoder=False, mtime=0) as writer:
        for group in [*groups[:2], replace(larger, latents=torch.zeros(3, 8, 2, 2).half())]:
            writer.write(group.encode())
    with pytest.raises(DataError, match="one size"):
        read_shards(tmp_path)
