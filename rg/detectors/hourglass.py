"""The trunk that the convolutional networks that judge images share."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.detectors.stored import StoredNetwork


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al., 2016): (B, inputs, h, w) -> (B, outputs, h/stride, w/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.SiLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.GroupNorm(8, outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.shortcut(x) + self.body(x))


class Hourglass(StoredNetwork):
    """An hourglass (Newell et al., 2016) over patches: local features that know of the whole image.

    Args:
        widths: channels at 1, 1/2 and 1/4 of the patches' resolution, multiples of 8.
        patch: side of a patch in pixels; images enter as patches, so that nearly all arithmetic is at 1 / patch.
    """

    def __init__(self, widths: Sequence[int], patch: int) -> None:
        super().__init__()
        if len(widths) != 3 or any(width <= 0 or width % 8 for width in widths):
            raise ValueError(f"expected three positive multiples of 8, got {list(widths)}: change `widths`")
        self.widths, self.patch = tuple(widths), patch
        fine, middle, coarse = widths
        self.stem = nn.Conv2d(3 * patch**2, fine, 3, padding=1)
        self.fine = ResidualBlock(fine, fine)
        self.middle = ResidualBlock(fine, middle, 2)
        self.coarse = ResidualBlock(middle, coarse, 2)
        self.merge_middle = ResidualBlock(coarse + middle, middle)
        self.merge_fine = ResidualBlock(middle + fine, fine)

    def _pyramid(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = 4 * self.patch
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % side or images.shape[3] % side:
            expected = f"images (B, 3, H, W) with H and W multiples of {side}"
            raise ValueError(f"expected {expected}, got {tuple(images.shape)}")
        fine = self.fine(F.silu(self.stem(F.pixel_unshuffle(images, self.patch))))
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of every patch, and of squares of 4x4 patches.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of 4 * patch.

        Returns:
            (B, widths[0], H / patch, W / patch) and (B, widths[2], H / patch / 4, W / patch / 4).

        Raises:
            ValueError: images of another shape.
        """
        fine, middle, coarse = self._pyramid(images)
        merged = self.merge_middle(torch.cat([_double(coarse), middle], 1))
        return self.merge_fine(torch.cat([_double(merged), fine], 1)), coarse

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features for distances between sets of images: images (B, 3, H, W) in [-1, 1] -> (B, widths[2])."""
        return self._pyramid(images)[2].mean((2, 3))


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
