"""Triplets: an image, another one of the same things, and the first edited by the model itself."""

import hashlib
from collections.abc import Sequence

import torch
from diffusers import AutoPipelineForImage2Image
from torch import Tensor

from data_prep.records import GroupLabel, Skip, SourceGroup
from rg.backbone.diffusion import DiffusionBackbone


class SDEdit:
    """Edits the first image of each group (Meng et al., 2022): its layout stays, its appearance changes.

    The images of a label are the first, the last, the edited one, and the negatives that the source knows. An edit
    depends on image, prompt and settings alone.

    Args:
        strength: share of the noise schedule that is gone back and through again, in (0, 1].
        guidance_scale: strength of the prompt.
        num_inference_steps: of the whole schedule, of which the share `strength` is run.
        seed: of the noise.
        batch_size: images that are edited at once, always as many: the last bits depend on it.
    """

    def __init__(
        self,
        *,
        strength: float = 0.5,
        guidance_scale: float = 3.5,
        num_inference_steps: int = 50,
        seed: int = 0,
        batch_size: int = 10,
    ) -> None:
        if not 0 < strength <= 1 or strength * num_inference_steps < 1:
            raise ValueError(
                f"expected strength in (0, 1] and at least one step of it, got strength={strength}, "
                f"num_inference_steps={num_inference_steps}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.arguments = {"strength": strength, "guidance_scale": guidance_scale}
        self.arguments["num_inference_steps"] = num_inference_steps
        self.seed, self.batch_size = seed, batch_size

    def attach_backbone(self, backbone: DiffusionBackbone) -> None:
        """Sets the model that edits; raises ValueError where its family has no image-to-image pipeline."""
        try:
            self.pipe = AutoPipelineForImage2Image.from_pipe(backbone.pipeline)
        except ValueError as error:
            name = type(backbone.pipeline).__name__
            raise ValueError(f"backbone: expected a model that can edit images, got a {name}: {error}") from error
        self.pipe.set_progress_bar_config(disable=True)

    def annotate(self, samples: Sequence[SourceGroup]) -> list[GroupLabel | Skip]:
        labels = []
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size]
            prompts = [s.prompt if s.edit_prompt is None else s.edit_prompt for s in batch]
            edited = self._edit(torch.stack([sample.images[0] for sample in batch]), prompts)
            for sample, edit in zip(batch, edited, strict=True):
                known = sample.images[:0] if sample.negatives is None else sample.negatives
                images = torch.cat([sample.images[[0, -1]], edit[None], known])
                labels.append(GroupLabel(images, torch.zeros(0, len(images), 3)))
        return labels

    def _edit(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Edits of up to batch_size uint8 images: (B, 3, H, W) uint8."""
        missing = self.batch_size - len(images)
        padded = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
        names = (hashlib.sha256(f"{self.seed}/".encode() + image.numpy().tobytes()).digest()[:8] for image in padded)
        generators = [torch.Generator("cpu").manual_seed(int.from_bytes(name, "big") >> 1) for name in names]
        edited = self.pipe(
            prompts + [""] * missing, image=padded / 255, generator=generators, output_type="pt", **self.arguments
        ).images
        return (edited[: len(images)].float() * 255).round().byte().cpu()
