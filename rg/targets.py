"""What a readout is asked to match."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from rg.points import Size

Control = Tensor | Image | Sequence[Image]


class FixedTarget:
    """The same control at every step, one for all images or one per image.

    Args:
        control: an RGB picture, a list of them, a tensor of pictures (B, 3, H, W) in [-1, 1], or keypoints
            (B, P, 18, 3) of (x, y, visible) in pixels of the image being made. B is 1 or the number of images.

    Raises:
        ValueError: a picture is not in RGB mode, the pictures differ in size, or there is none.
    """

    def __init__(self, control: Control) -> None:
        self.control = control.float() if isinstance(control, Tensor) else _to_tensor(control)
        if not len(self.control):
            raise ValueError("control: expected at least one picture or pose, got an empty batch")
        self._encoded: dict[Any, Tensor] = {}

    def encode(self, head: Any, *, readout_size: Size, image_size: Size, device: torch.device) -> Tensor:
        """The control on the readout's grid, by the head's own `encode_target`; made once per size and device."""
        key = (head, readout_size, image_size, device)
        if key not in self._encoded:
            encoded = head.encode_target(self.control, readout_size=readout_size, image_size=image_size)
            self._encoded[key] = encoded.to(device)
        return self._encoded[key]


def _to_tensor(control: Image | Sequence[Image]) -> Tensor:
    pictures = [control] if isinstance(control, Image) else list(control)
    for number, picture in enumerate(pictures):
        if picture.mode != "RGB":
            raise ValueError(f"control: picture {number} has mode {picture.mode}, expected RGB")
        if picture.size != pictures[0].size:
            raise ValueError(f"control: picture {number} is {picture.size}, the first one {pictures[0].size}")
    arrays = [np.asarray(picture, dtype=np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1 if arrays else torch.zeros(0)
