import io
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
