import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from webdataset import TarWriter

from rg.data.datamodule import ShuffledEpochs
from rg.data.samples import DataError, Group, Groups
from rg.data.shards import Manifest, read_shards

SHARD = Path("shard-000000.tar")
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


@pytest.mark.parametrize("group", [GROUP, replace(GROUP, points=torch.zeros(0, 2, 3), turn=None, seed=None)])
def test_decode_is_the_inverse_of_encode(group):
    back = Group.decode(group.encode(), SHARD)
    for name in ("images", "points", "latents"):
        assert torch.equal(getattr(back, name), getattr(group, name)), name
    for name in ("index", "turn", "prompt", "kind", "seed", "identity"):
        assert getattr(back, name) == getattr(group, name), name


@pytest.mark.parametrize("member", ["0.png", "1.png", "json", "latent.npy"])
def test_missing_member_is_named(member):
    raw = GROUP.encode()
    del raw[member]
    with pytest.raises(DataError, match=f"sample 00000007 .*'{member}'.*only"):
        Group.decode(raw, SHARD)


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
def test_what_the_json_says_is_checked(change, words):
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
    with pytest.raises(DataError, match="images and latents of one size"):
        read_shards(tmp_path)
