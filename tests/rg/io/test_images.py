import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rg.io.images import FORMATS, decode_png, from_bytes, open_image, open_mask, pixels, save_image, to_bytes

RATIONAL, TEXT = 10, 2  # types of EXIF entries


def write_jpeg(path: Path, kind: int, count: int, payload: bytes, orientation: int = 6) -> None:
    """A grey image 60 wide and 40 high whose EXIF data asks for a turn, and has a resolution of another type."""
    stream = io.BytesIO()
    Image.new("RGB", (60, 40), (90, 90, 90)).save(stream, "JPEG")
    turn = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    resolution = struct.pack("<HHII", 0x011A, kind, count, 38)
    entries = struct.pack("<H", 2) + turn + resolution + bytes(4)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + entries + payload
    jpeg = stream.getvalue()
    path.write_bytes(jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:])


def png_header(width: int, height: int) -> bytes:
    """A grey PNG that ends where its pixels would begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"")]
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_every_byte_comes_back_and_the_ends_are_exact() -> None:
    levels = torch.arange(256).to(torch.uint8)
    floats = from_bytes(levels)
    assert floats.dtype == torch.float32 and (floats[0], floats[-1]) == (-1, 1)
    assert torch.equal(floats, levels.float() / 127.5 - 1) and torch.equal(to_bytes(floats), levels)


def test_what_lies_outside_is_cut_off_and_half_precision_is_taken() -> None:
    assert to_bytes(torch.tensor([-3.0, -1.0, 1.0, 3.0])).tolist() == [0, 0, 255, 255]
    assert to_bytes(torch.tensor([-1.0, 0.5, 1.0]).half()).tolist() == [0, 191, 255]


def test_pixels_are_rows_by_columns_and_come_back_from_a_file(tmp_path) -> None:
    array = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    image = pixels(Image.fromarray(array))
    assert image.dtype == torch.uint8 and image[2, 3, 4] == array[3, 4, 2]
    save_image(from_bytes(image), tmp_path / "image.png")
    assert torch.equal(pixels(open_image(tmp_path / "image.png")), image)


@pytest.mark.parametrize(
    ("kind", "count", "payload"),
    [(RATIONAL, 1, struct.pack("<ii", -5, 3)), (TEXT, 8, b"seventy\0"), (TEXT, 2**31, b"")],
)
def test_exif_data_that_cannot_be_written_again_still_turns_the_image(tmp_path, kind, count, payload) -> None:
    write_jpeg(tmp_path / "a.jpg", kind, count, payload)
    assert open_image(tmp_path / "a.jpg").size == (40, 60)


def test_an_image_is_good_without_its_damaged_exif_data(tmp_path) -> None:
    write_jpeg(tmp_path / "a.jpg", TEXT, 8, b"seventy\0")
    data = (tmp_path / "a.jpg").read_bytes()
    for damaged in (data.replace(b"II*\0", b"XX*\0"), data.replace(b"II*\0\x08\0\0\0", b"II*\0\xff\xff\xff\xff")):
        (tmp_path / "a.jpg").write_bytes(damaged)
        assert open_image(tmp_path / "a.jpg").size == (60, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_orientations_are_undone(tmp_path, orientation, ending) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / f"a.{ending}", exif=exif)
    upright = array if orientation < 5 else array.transpose(1, 0, 2)
    upright = upright[:, ::-1] if orientation in (2, 3, 6, 7) else upright
    upright = upright[::-1] if orientation in (3, 4, 7, 8) else upright
    assert np.array_equal(np.asarray(open_image(tmp_path / f"a.{ending}")), upright)


@pytest.mark.parametrize("form", FORMATS)
def test_what_a_file_is_its_content_says(tmp_path, form) -> None:
    Image.new("RGB", (8, 6), (200, 0, 0)).save(tmp_path / "a.png", format=form)
    image = open_image(tmp_path / "a.png")
    assert (image.mode, image.size) == ("RGB", (8, 6)) and image.getpixel((3, 3))[0] > 190


def test_no_other_format_is_read_and_no_other_program_started(tmp_path, monkeypatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "postscript.png").write_bytes(postscript)
    Image.new("RGB", (4, 4)).save(tmp_path / "gif.png", format="GIF")
    for name in ("postscript.png", "gif.png"):
        with pytest.raises(ValueError, match=rf"{tmp_path / name}: expected .*PNG, JPEG, WEBP, BMP, TIFF.* found "):
            open_image(tmp_path / name)
    assert not (tmp_path / "started").exists()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, found in (("pipe.png", "something else"), ("folder.png", "something else"), ("none.png", "none")):
        with pytest.raises(ValueError, match=rf"{tmp_path / name}: expected a regular file, found {found}"):
            open_image(tmp_path / name)


def test_an_image_is_refused_by_its_size_before_it_is_decoded(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(13_000, 13_000))
    with pytest.raises(ValueError, match=rf"{tmp_path}/a.png: .*100,000,000 .*13000 x 13000"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"RGB image of \(4, 4\), found L of \(9000, 9000\)"):
        decode_png(png_header(9000, 9000), (4, 4))
    with (tmp_path / "hole.png").open("wb") as file:
        file.truncate(2**36)
    with pytest.raises(ValueError, match=r"hole.png: expected at most .* bytes, found 68,719,476,736"):
        open_image(tmp_path / "hole.png")


def test_what_is_transparent_is_black(tmp_path) -> None:
    levels = np.full((4, 4, 4), (255, 255, 255, 0), np.uint8)
    levels[1, 1], levels[2, 2] = (255, 0, 0, 255), (200, 100, 0, 51)
    Image.fromarray(levels).save(tmp_path / "a.png")
    image = np.asarray(open_image(tmp_path / "a.png"))
    assert image[0, 0].tolist() == [0, 0, 0] and image[1, 1].tolist() == [255, 0, 0]
    assert image[2, 2].tolist() == [40, 20, 0]  # a fifth of it
    Image.fromarray(levels[..., [0, 3]], "LA").save(tmp_path / "grey.png")
    assert not np.asarray(open_image(tmp_path / "grey.png"))[0, 0].any()
    palette = Image.new("P", (2, 1), 1)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert not np.asarray(open_image(tmp_path / "palette.png")).any()


def test_a_mask_is_what_is_neither_black_nor_transparent(tmp_path) -> None:
    square = np.zeros((8, 8), np.uint8)
    square[2:5, 3:6] = 255
    opaque = np.dstack([square] * 3 + [np.full_like(square, 255)])
    cut_out = np.dstack([np.full_like(square, 255)] * 3 + [square])
    instances = Image.fromarray((square > 0).astype(np.uint8))  # 1 of 255 in grey, or the second color of a palette
    indexed = instances.copy()
    indexed.putpalette([9, 9, 9, 0, 0, 0])
    masks = [square, square.astype(np.uint16), opaque, cut_out, square > 0, instances, indexed]
    for mask in masks:
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(tmp_path / "mask.png")
        assert np.array_equal(open_mask(tmp_path / "mask.png"), square > 0), mask


def test_sixteen_bits_become_the_nearest_of_256_levels(tmp_path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for ending in ("png", "tiff"):
        Image.fromarray(levels).save(tmp_path / f"a.{ending}")
        image = np.asarray(open_image(tmp_path / f"a.{ending}"))
        assert np.array_equal(image, np.repeat((levels / 257).round().astype(np.uint8)[..., None], 3, -1))


def test_levels_that_no_image_has_are_refused(tmp_path) -> None:
    for levels, found in ((np.array([[70_000]], np.int32), "70000"), (np.array([[0.5]], np.float32), "floating point")):
        Image.fromarray(levels).save(tmp_path / "depth.tiff")
        with pytest.raises(ValueError, match=rf"depth.tiff: expected levels of .*16 bits, found .*{found}"):
            open_image(tmp_path / "depth.tiff")
