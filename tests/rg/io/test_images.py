import numpy as np
import torch
from PIL import Image

from rg.io.images import from_bytes, open_image, pixels, save_image, to_bytes


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
