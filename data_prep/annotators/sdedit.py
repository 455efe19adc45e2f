"""Triplets: an image, another one of the same things, and the first edited by the model itself."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image, DDIMScheduler
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
        """Sets the model that edits, by its image-to-image pipeline where its family has one."""
        try:
            pipe = AutoPipelineForImage2Image.from_pipe(backbone.pipeline)
            pipe.set_progress_bar_config(disable=True)
            self.edit: Callable[..., Tensor] = lambda *given, **named: pipe(*given, output_type="pt", **named).images
        except ValueError:
            self.edit = LateStart(backbone)

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
        prompts = prompts + [""] * missing
        edited = self.edit(prompts, image=padded / 255, generator=generators, **self.arguments)
        return (edited[: len(images)].float() * 255).round().byte().cpu()


class LateStart:
    """Edits by a text-to-image pipeline that begins with a noisy image in the middle of its schedule.

    Args:
        backbone: with a pipeline that takes `latents` and asks its scheduler for the timesteps, as PixArt's does.
    """

    def __init__(self, backbone: DiffusionBackbone) -> None:
        self.backbone = backbone

    def __call__(
        self,
        prompts: list[str],
        *,
        image: Tensor,
        generator: list[torch.Generator],
        strength: float,
        num_inference_steps: int,
        **arguments: Any,
    ) -> Tensor:
        """Edits of images (B, 3, H, W) in [0, 1], and in the same range; the arguments of image-to-image pipelines."""
        pipe, device, height = self.backbone.pipeline, self.backbone.device, image.shape[-2]
        schedule = LateSchedule.from_config(pipe.scheduler.config)
        schedule.skipped = num_inference_steps - min(int(num_inference_steps * strength), num_inference_steps)
        schedule.set_timesteps(num_inference_steps)
        mean, std = self.backbone.encode(image * 2 - 1)
        noise = [torch.randn((2, *mean.shape[1:]), generator=each) for each in generator]
        spread, noise = torch.stack(noise, 1).to(mean)
        start = schedule.timesteps[:1].repeat(len(image)).to(device)
        latents = self.backbone.add_noise(mean + std * spread, noise, start).to(self.backbone.denoiser.dtype)
        usual, pipe.scheduler = pipe.scheduler, schedule
        size = {"height": height, "width": image.shape[-1]}
        if "PixArt" in type(pipe).__name__:
            size["use_resolution_binning"] = False  # the image keeps its size
        try:
            made = pipe(
                prompts,
                latents=latents,
                num_inference_steps=num_inference_steps,
                output_type="latent",
                **size,
                **arguments,
            ).images
        finally:
            pipe.scheduler = usual
        return (self.backbone.decode(made.float()) + 1) / 2


class LateSchedule(DDIMScheduler):
    """DDIM without its first steps."""

    skipped = 0

    def set_timesteps(self, *given: Any, **named: Any) -> None:
        """As of DDIMScheduler."""
        super().set_timesteps(*given, **named)
        self.timesteps = self.timesteps[self.skipped :]
