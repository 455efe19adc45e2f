"""Pictures from files."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# What Pillow raises for a file that is no picture, a damaged one, or one that is suspiciously large.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def open_picture(path: Path) -> Image.Image:
    """Reads a picture as RGB, turned upright as its EXIF data says; raises one of UNREADABLE."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I"):  # 16 bits, as depth often has: Pillow would cut off what exceeds 255
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    return upright.convert("RGB")
