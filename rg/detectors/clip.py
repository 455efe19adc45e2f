"""CLIP's image features, for distances between sets of images."""

from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from transformers import CLIPVisionModelWithProjection

# Of the levels that CLIP was trained on.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CHUNK = 32  # images at once


class ClipFeatures:
    """Embeds images as CMMD does (Jayasumana et al., 2024, section 5): resized to CLIP's input, features of length 1.

    Args:
        model: CLIP's image encoder with its projection; their numbers are of ViT-L/14 for 336 pixels.
    """

    def __init__(self, model: "CLIPVisionModelWithProjection") -> None:
        self.model = model.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Self:
        """Loads a folder, or a repository of the hub, on the GPU where there is one.

        Raises:
            FileNotFoundError: neither is there, or it is of another network.
        """
        from transformers import CLIPVisionModelWithProjection  # loaded where it is used alone: it takes seconds

        try:
            model, info = CLIPVisionModelWithProjection.from_pretrained(name, output_loading_info=True)
            if info["missing_keys"]:
                raise ValueError(f"no weights {min(info['missing_keys'])}")
        except Exception as error:  # no network, no such name, a damaged file: every kind has a class of its own
            found = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FileNotFoundError(
                f"clip={name}: expected a folder or a repository of the hub with a CLIPVisionModelWithProjection, such "
                f"as openai/clip-vit-large-patch14-336, found {found}"
            ) from error
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) in [-1, 1]: (B, D) of length 1, on the CPU."""
        side = self.model.config.image_size
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        features = []
        for chunk in images.cpu().split(CHUNK):
            levels = F.interpolate((chunk + 1) / 2, (side, side), mode="bicubic", antialias=True, align_corners=False)
            pixels = (levels.clamp(0, 1) - mean) / std
            features.append(self.model(pixels.to(self.model.device)).image_embeds.float().cpu())
        return F.normalize(torch.cat(features), dim=-1)
