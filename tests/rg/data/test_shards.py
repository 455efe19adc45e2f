import io
import json
import tarfile

import pytest
import torch

from rg.data.samples import DataError, Samples
from rg.data.shards import MAX_MEMBER, Manifest, read_shards


@pytest.fixture
def folder(tmp_path, make_split):
    make_split(tmp_path / "train", 25, skipped=[3])
    return tmp_path / "train"


def test_all_samples_are_read_in_order(tmp_path, make_split):
    written = make_split(tmp_path / "val", 25, skipped=[3, 20])
    read = read_shards(tmp_path / "val")
    assert read.index.tolist() == [i for i in range(25) if i not in (3, 20)]
    assert read.image == [sample.image for sample in written] and read.label == [sample.label for sample in written]
    assert torch.equal(read.latent, torch.stack([sample.latent for sample in written]))
    assert read.keypoints.shape == (23, 2, 18, 3)
    assert torch.equal(read.keypoints[1, :1], written[1].keypoints) and not read.keypoints[1, 1:].any()
    assert read.prompt[0] == "image 0"


@pytest.mark.parametrize("available", [None, 25])
def test_subsets_are_nested(folder, available):
    subsets = [read_shards(folder, size, available=available, seed=1).index.tolist() for size in (3, 8, 24)]
    assert subsets[0] == subsets[1][:3] and subsets[1] == subsets[2][:8]
    assert sorted(subsets[2]) == [i for i in range(25) if i != 3]
    assert (subsets[2] == sorted(subsets[2])) == (available is None)


def test_available_bounds_the_pool_and_the_seed_orders_it(folder):
    first, second = (read_shards(folder, available=12, seed=seed).index.tolist() for seed in (0, 1))
    assert first != second and sorted(first) == sorted(second) == [i for i in range(12) if i != 3]


def test_only_the_shards_that_are_needed_are_opened(folder):
    (folder / "shard-000002.tar").unlink()
    assert len(read_shards(folder, 15)) == 15
    with pytest.raises(DataError, match=r"shard-000002\.tar is missing.* 5 samples"):
        read_shards(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"/nowhere: .*manifest.json"):
        read_shards(tmp_path / "nowhere")


def test_too_few_samples(folder):
    with pytest.raises(DataError, match=r"train: .*25 .*24 .*1 .*skipped"):
        read_shards(folder, 25)


def test_empty_split(tmp_path, make_split):
    make_split(tmp_path / "val", 2, skipped=[0, 1])
    with pytest.raises(DataError, match="val.* at least 1 .* 0 "):
        read_shards(tmp_path / "val")


def test_another_autoencoder_is_refused(folder):
    assert len(read_shards(folder, autoencoder_id="a" * 16)) == 24
    with pytest.raises(DataError, match="train: .*autoencoder bbbb.* aaaaaaaaaaaaaaaa"):
        read_shards(folder, autoencoder_id="bbbb")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.77])
def test_truncated_shard(folder, keep):
    path = folder / "shard-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(DataError, match=r"shard-000001.tar is truncated"):
        read_shards(folder)


def test_truncated_between_two_samples(folder):
    path = folder / "shard-000001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmember("00000015.image.png").offset
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(DataError, match="truncated.* 10 .* 5"):
        read_shards(folder)


@pytest.mark.parametrize("name", ["../../escaped.json", "/tmp/rg-escaped.json", "0000.json"])
def test_foreign_member_names_are_refused_and_written_nowhere(tmp_path, make_split, name):
    folder = tmp_path / "a" / "b" / "train"
    make_split(folder, 5)
    before = sorted(tmp_path.rglob("*"))
    with tarfile.open(folder / "shard-000000.tar", "a") as tar:
        member = tarfile.TarInfo(name)
        member.size = 2
        tar.addfile(member, io.BytesIO(b"{}"))
    with pytest.raises(DataError, match=r"shard-000000.tar is .*damaged .*eight digits.* '"):
        read_shards(folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_are_not_followed(folder):
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("00000003.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert 3 not in read_shards(folder).index.tolist()


def test_a_member_is_refused_by_its_size_before_it_is_read(folder):
    path = folder / "shard-000000.tar"
    whole, hole = path.read_bytes(), tarfile.TarInfo("00000000.z")
    hole.size = 2**36
    path.write_bytes(hole.tobuf() + whole)
    with path.open("r+b") as file:  # as if the member were there: a hole in the file
        file.truncate(2**36 + len(whole))
    with pytest.raises(DataError, match=rf"00000000\.z: .*{MAX_MEMBER:,} bytes, found {2**36:,}"):
        read_shards(folder)
    sparse = tarfile.TarInfo("00000000.z")  # 512 bytes that stand for many more, in GNU's format
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[386:410], header[483:495] = b"%011o\0%011o\0" % (0, 512), b"%011o\0" % 2**32
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * ord(" ") + sum(header[156:512]))
    path.write_bytes(bytes(header) + bytes(512) + whole)
    with pytest.raises(DataError, match=rf"00000000\.z: .*found {2**32:,} sparse"):
        read_shards(folder)


def damaged(**changed):
    """What a manifest holds, its first shard's entry changed."""
    return lambda content: content["shards"]["shard-000000.tar"].update(changed)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content.update(shards=None), "shards: .*found None"),
        (lambda content: content.update(skipped=float("nan")), "NaN"),
        (damaged(start=float("inf")), "Infinity"),
        (damaged(start=1.5), r"shards\.shard-000000\.tar\.start: .*integer, found 1\.5"),
        (damaged(start="0"), r"start: .*integer, found '0'"),
        (damaged(stop=-1), r"stop: .*0, found -1"),
        (damaged(samples=11), "sample for each index"),
        (damaged(stop=10**8), "100,000,015 indices of .*shards.*, got 25"),
        (lambda content: content["shards"].update({"../x.tar": {}}), r"shards\.\.\./x\.tar.*, found '\.\./x\.tar'"),
        (lambda content: content.update(skipped={"3": "no"}), "skipped.3.*8.*found '3'"),
        (lambda content: content.update(colour=2), "colour: expected no such key, found 2"),
        (lambda content: content.pop("split"), "split: expected this key, found none"),
        (lambda content: content.update(settings=[[]]), r"settings: .*found \[\[\]\]"),
    ],
)
def test_a_manifest_is_checked_before_it_is_used(folder, damage, words):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"{path}: .*{words}"):
        read_shards(folder)


def test_what_the_manifest_does_not_count_is_not_read(folder):
    manifest = Manifest.read(folder)
    manifest.shards["shard-000002.tar"] |= {"stop": 22, "samples": 2}
    manifest.write(folder)
    assert read_shards(folder).index.tolist()[-1] == 21


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSON"),
        ("[]", r"found \[\]"),
        ("{}", "samples: .*none"),
        ('{"samples": "1"}', "samples: .*integer, found '1'"),
    ],
)
def test_damaged_manifest(folder, text, words):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{words}"):
        read_shards(folder)


def test_manifest_says_how_many(folder):
    assert json.loads((folder / "manifest.json").read_text())["samples"] == 24
    assert Manifest.read(folder).indices() == [i for i in range(25) if i != 3]


def test_the_manifest_says_what_the_samples_are(folder):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["kind"]  # as it was before there was one
    path.write_text(json.dumps(content))
    assert Manifest.read(folder).kind is None and isinstance(read_shards(folder), Samples)
    for kind, named in (("group", "json of sample .*pictures: .*this key"), ("video", "kind: .*'group'.*'video'")):
        path.write_text(json.dumps({**content, "kind": kind}))
        with pytest.raises(DataError, match=named):
            read_shards(folder)
