"""What a readout is asked to match."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from rg.backbone.features import outside_inference_mode
from rg.heads.protocol import EnergyHead
from rg.io.images import from_bytes, pixels
from rg.points import KEYPOINTS, Size, check_visible

Control = Tensor | Image | Sequence[Image]


class FixedTarget:
    """The same control at every step, one for all images or one per image.

    Args:
        control: an RGB image, a list of them, a tensor of images (B, 3, H, W) in [-1, 1], or keypoints
            (B, P, 18, 3) of (x, y, visible) in pixels of the image that comes out. B is 1, the number of images or
            that of prompts.

    Raises:
        ValueError: an image is not in RGB mode, the images differ in size, there is none, or the place of a visible
            keypoint is no number.
    """

    def __init__(self, control: Control) -> None:
        self.control = control.float() if isinstance(control, Tensor) else _to_tensor(control)
        if not len(self.control):
            raise ValueError("control: expected at least one image or pose, got an empty batch")
        if self.control.shape[-2:] == (len(KEYPOINTS), 3):
            check_visible(self.control, "control")
        self._encoded: dict[tuple[Any, ...], Tensor] = {}

    def encode(
        self,
        head: EnergyHead,
        *,
        readout_size: Size,
        image_size: Size,
        shown_size: Size | None = None,
        device: torch.device,
    ) -> Tensor:
        """The control on the readout's grid, by the head's own `encode_target`; made once per size and device.

        Args:
            image_size: (height, width) of the image being made, which the readout covers.
            shown_size: of the one that comes out, where the pipeline resizes the image and cuts the middle out.
        """
        key = (head, readout_size, image_size, shown_size, device)
        if key not in self._encoded:
            control = self.control
            if shown_size not in (None, image_size):
                control, image_size = uncut(control, shown_size, image_size)
            encoded = head.encode_target(control, readout_size=readout_size, image_size=image_size)
            self._encoded[key] = outside_inference_mode(encoded.to(device))
        return self._encoded[key]


class ReferenceTarget:
    """What a head read of a reference image at every step of one run: recorded once, for any number of guided runs.

    An image is run by `with guidance.record(pipe): pipe(...)`; a real one from the noise that `invert` gives.
    Memory is 4 bytes a number and step: a readout of 384 channels takes 6.3 MB on a latent grid of 64x64 (512 px in
    Stable Diffusion), 25 MB on 128x128 (1024 px in SDXL), twice that for both branches; a point's vector 1.5 kB.

    Args:
        keep: what the energy reads of a readout, (B, ...) of (B, C, H, W), such as the vectors at some points; None
            keeps it whole.
        device: where it is kept, None: where it was made.
    """

    def __init__(
        self, *, keep: Callable[[Tensor], Tensor] | None = None, device: str | torch.device | None = "cpu"
    ) -> None:
        self.keep, self.device = keep, device
        self._kept: dict[int, tuple[float, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the recorded steps take."""
        return sum(kept.nbytes for _, kept in self._kept.values())

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._kept.clear()

    def store(self, step: int, timestep: float, readout: Tensor) -> None:
        """Keeps the readout of one step: (G, B, C, H, W), of B images in G branches."""
        kept = readout.detach()
        if self.keep is not None:
            kept = torch.stack([self.keep(branch) for branch in kept])
        self._kept[step] = (timestep, kept.to(self.device or kept.device, copy=True))

    def at(self, step: int, timestep: float, device: torch.device) -> Tensor:
        """What was kept at a step: (G, B, ...).

        Raises:
            ValueError: nothing was recorded at this step, or at another time.
        """
        if step not in self._kept:
            raise ValueError(
                f"reference: expected one recorded at step {step} (t={timestep:g}), got {sorted(self._kept)}: run "
                "`with guidance.record(pipe): pipe(...)` first, with the same number of steps"
            )
        recorded, kept = self._kept[step]
        if abs(recorded - timestep) > 1e-3:
            raise ValueError(
                f"reference: expected step {step} at t={recorded:g} as it was recorded, got t={timestep:g}; scheduler, "
                "number of steps and strength must be those of the recorded run"
            )
        return kept.to(device)


def uncut(control: Tensor, shown_size: Size, image_size: Size) -> tuple[Tensor, Size]:
    """A control of an image that is cut out of the middle of a resized one, on all of that one; and its size.

    As PixArt's pipelines resize and cut (VaeImageProcessor.resize_and_crop_tensor). Images are continued by their
    edges; what is neither an image (B, C, H, W) nor keypoints (B, P, 18, 3) is left alone.
    """
    ratio = max(shown_size[0] / image_size[0], shown_size[1] / image_size[1])
    resized = (int(image_size[0] * ratio), int(image_size[1] * ratio))
    top, left = ((whole - part) // 2 for whole, part in zip(resized, shown_size, strict=True))
    if control.ndim != 4:
        return control, resized
    if control.shape[-2:] == (len(KEYPOINTS), 3):
        return control + control.new_tensor([left, top, 0]), resized
    bottom, right = resized[0] - shown_size[0] - top, resized[1] - shown_size[1] - left
    control = F.interpolate(control, size=shown_size, mode="bilinear", align_corners=False, antialias=True)
    return F.pad(control, (left, right, top, bottom), mode="replicate"), resized


def _to_tensor(control: Image | Sequence[Image]) -> Tensor:
    images = [control] if isinstance(control, Image) else list(control)
    for number, image in enumerate(images):
        if image.mode != "RGB":
            raise ValueError(f"control: image {number} has mode {image.mode}, expected RGB")
        if image.size != images[0].size:
            raise ValueError(f"control: image {number} is {image.size}, the first one {images[0].size}")
    return from_bytes(torch.stack([pixels(image) for image in images])) if images else torch.zeros(0)
