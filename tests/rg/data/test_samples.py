import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rg.data.samples import DataError, Sample, Samples

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


def as_npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def as_png(mode, size):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, format="PNG")
    return stream.getvalue()


def test_decode_is_the_inverse_of_encode():
    back = Sample.decode(SAMPLE.encode(), SHARD)
    for name in ("image", "label", "keypoints", "latent"):
        assert torch.equal(getattr(back, name), getattr(SAMPLE, name)), name
    for name in ("index", "prompt", "kind", "seed", "identity"):
        assert getattr(back, name) == getattr(SAMPLE, name), name


@pytest.mark.parametrize("member", ["image.png", "label.png", "json", "latent.npy"])
def test_missing_member_is_named(member):
    raw = SAMPLE.encode()
    del raw[member]
    with pytest.raises(DataError, match=f"sample 00000007 .*'{member}'.*only"):
        Sample.decode(raw, SHARD)


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
    torch.testing.assert_close(first["image"], SAMPLE.image / 255 * 2 - 1)
    torch.testing.assert_close(first["label"], SAMPLE.label / 255 * 2 - 1)
    assert torch.equal(first["latent_mean"], SAMPLE.latent[:4].float())
    assert torch.equal(first["latent_std"], SAMPLE.latent[4:].float())
    assert torch.equal(first["keypoints"], SAMPLE.keypoints)
    assert second["keypoints"].shape == (1, 18, 3) and not second["keypoints"].any()
    assert (int(second["index"]), second["epoch"], second["prompt"]) == (9, 0, SAMPLE.prompt)
