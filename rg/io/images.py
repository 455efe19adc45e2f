"""Images from files and to them, as bytes and as floats: the one owner of both conversions."""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rg.io.files import atomic, require_file
from rg.io.keypoints import SizedPose, read_pose, to_tensor
from rg.points import Size, rescale

# What is read, by content and whatever the name: decoders inside Pillow, none of which starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
# What such files end in.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 100_000_000  # the largest photographs have 60 to 100 million
MAX_BYTES = 8 * MAX_PIXELS + 2**20  # as many pixels of four channels of 16 bits, and their header
BLACK = (0, 0, 0, 255)  # what lies behind what is transparent
ORIENTATION = 0x0112
# EXIF orientation -> how the stored image becomes upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: Path) -> Image.Image:
    """Reads an image as RGB, upright as its EXIF data says, black where it is transparent.

    Raises:
        ValueError: no regular file, none of FORMATS, a damaged one, or one of more than MAX_PIXELS; the message names
            the path, what was expected and what was found.
    """
    return _to_rgb(_open(path), str(path))


def open_mask(path: Path) -> np.ndarray:
    """Where the image of a mask is not black, an opaque pixel of a palette not its first color: (H, W) bool.

    Raises:
        ValueError: see `open_image`.
    """
    image = _open(path)
    if image.has_transparency_data:
        opaque = np.asarray(image.convert("RGBA"))[..., 3] > 0
        if image.mode == "P":
            return (np.asarray(image) != 0) & opaque
        image = _to_rgb(image, str(path))
    levels = np.asarray(image)
    return levels != 0 if levels.ndim == 2 else levels.any(-1)


def decode_png(data: bytes, size: Size) -> Image.Image:
    """The RGB image of (height, width) in the bytes of a PNG.

    Raises:
        ValueError: it is another image, which is not decoded; whatever Pillow raises where the bytes are damaged.
    """
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    if (image.mode, image.size[::-1]) != ("RGB", size):
        raise ValueError(f"expected an RGB image of {size}, found {image.mode} of {image.size[::-1]}")
    image.load()
    return image


def open_saved(path: Path, size: Size | None = None) -> Image.Image:
    """Reads an image that `save_image` wrote, of (height, width) or any size, and that is as it was written.

    Raises:
        ValueError: there is none, a checksum in it is wrong, or it is another image.
    """
    require_file(path, MAX_BYTES)
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            size = size or (image.height, image.width)
            image.verify()  # decoding alone does not look at the checksums
        return decode_png(data, size)
    except Exception as error:  # a damaged file may fail anywhere inside its decoder
        raise ValueError(f"{path}: expected a whole RGB PNG, found {error}") from error


def _open(path: Path) -> Image.Image:
    """The first image of a file in its own mode, upright."""
    require_file(path, MAX_BYTES)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF data that cannot be read, and of sizes, which are decided here
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"more than {MAX_PIXELS:,} pixels: {image.width} x {image.height}")
                image.load()
                turn = UPRIGHT.get(_orientation(image))
                return image.copy() if turn is None else image.transpose(turn)
    except Exception as error:  # a damaged file may fail anywhere inside its decoder
        raise ValueError(f"{path}: expected an image ({', '.join(FORMATS)}), found {error}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF data may be damaged in any way, and the image is good without
        return 1


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, as depth often has: Pillow would cut off what exceeds 255
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"{name}: expected levels of 16 bits, found {levels.min()} to {levels.max()}")
        # Rounded to the nearest of 256 levels; in integers, as a large image has no room for floats.
        return Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError(f"{name}: expected levels of 8 or 16 bits, found floating point")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, BLACK), image.convert("RGBA"))
    return image.convert("RGB")


def pixels(image: Image.Image) -> Tensor:
    """The pixels of an RGB image: (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def from_bytes(images: Tensor) -> Tensor:
    """Images of any shape, uint8 0..255, as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """Images of any shape, float in [-1, 1], as uint8 0..255 on the CPU; what lies outside is cut off."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def load_control(path: str | Path, image_size: Size, name: str = "control") -> Tensor | Image.Image:
    """A control from a file: an image as RGB, or keypoints as .json, moved to the image that will be made.

    The JSON holds {"size": [height, width], "keypoints": [people][18][x, y, visible]}, in pixels of that size, see
    rg.io.keypoints. Errors call the setting that names the file by `name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the image cannot be read, or the keypoints have another form.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{name}={path}: there is no such file")
    try:
        if path.suffix.lower() != ".json":
            return open_image(path)
        pose = read_pose(path, SizedPose)
    except ValueError as error:
        raise ValueError(f"{name}={error}") from error
    keypoints = to_tensor(pose.keypoints)
    if not len(keypoints):
        raise ValueError(f"{name}={path}: keypoints: expected at least 1 person, found none")
    moved = rescale(keypoints[..., :2], (pose.size[0], pose.size[1]), image_size)
    return torch.cat([moved, keypoints[..., 2:]], -1)[None]


def save_image(image: Tensor, path: Path) -> None:
    """Writes one image (3, H, W) in [-1, 1] as PNG, whole or not at all."""
    with atomic(path) as temporary:
        Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy()).save(temporary, format="PNG")
