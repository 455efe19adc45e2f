"""Images from files and to them, as bytes and as floats: the one owner of both conversions."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rg.io.files import atomic
from rg.points import KEYPOINTS, Size, rescale

# What Pillow raises for a file that is no image, a damaged one, or one that is suspiciously large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_image(path: Path) -> Image.Image:
    """Reads an image as RGB, turned upright as its EXIF data says; raises one of UNREADABLE."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits, as depth often has: Pillow would cut off what exceeds 255
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    return upright.convert("RGB")


def pixels(image: Image.Image) -> Tensor:
    """The pixels of an RGB image: (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def from_bytes(images: Tensor) -> Tensor:
    """Images of any shape, uint8 0..255, as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images of any shape, float in [-1, 1], as uint8 0..255 on the CPU; what lies outside is cut off."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def load_control(path: str | Path, image_size: Size) -> Tensor | Image.Image:
    """A control from a file: an image as RGB, or keypoints as .json, moved to the image that will be made.

    The JSON holds {"size": [height, width], "keypoints": [people][18][x, y, visible]}, in pixels of that size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image cannot be read, or the keypoints have another form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"control={path}: there is no such file")
    if path.suffix != ".json":
        try:
            return open_image(path)
        except UNREADABLE as error:
            raise ValueError(f"control={path}: expected an image, found {error!r}") from error
    try:
        record = json.loads(path.read_text())
        keypoints = torch.tensor(record["keypoints"], dtype=torch.float32)
        size = (int(record["size"][0]), int(record["size"][1]))
        if min(size) < 1:
            raise ValueError(f"size {size}")
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f'control={path}: expected {{"size": [h, w], "keypoints": [...]}}, found {error!r}') from error
    if keypoints.ndim != 3 or keypoints.shape[1:] != (len(KEYPOINTS), 3):
        raise ValueError(f"control={path}: expected keypoints (people, 18, 3), found {tuple(keypoints.shape)}")
    moved = rescale(keypoints[..., :2], size, image_size)
    return torch.cat([moved, keypoints[..., 2:]], -1)[None]


def save_image(image: Tensor, path: Path) -> None:
    """Writes one image (3, H, W) in [-1, 1] as PNG, whole or not at all."""
    with atomic(path) as temporary:
        Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy()).save(temporary, format="PNG")
