"""The model's own pictures: sampled without any guidance, endless, each from its prompt and its seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from data_prep.records import Skip, SourceSample
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.samples import SPLITS, DataError
from rg.generation import generate, image_seeds, set_scheduler
from rg.io.files import read_text
from rg.io.images import to_bytes


class Prompts(Protocol):
    """Gives the prompt of every place of a split."""

    def at(self, split: str, index: int) -> str: ...


class FilePrompts:
    """Prompts of a text file, one a line, again and again from its top.

    Raises:
        DataError: there is no prompt in it.
    """

    def __init__(self, path: str) -> None:
        self.prompts = [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]
        if not self.prompts:
            raise DataError(f"{path}: expected a prompt on each line, found none")

    def at(self, split: str, index: int) -> str:
        return self.prompts[index % len(self.prompts)]


class SampledSource:
    """Pictures that a frozen model makes of prompts; the picture at an index depends on (seed, split, index).

    Args:
        prompts: see Prompts.
        seed: of the pictures.
        resolution: side of the images in pixels.
        steps, guidance_scale, scheduler: of the sampling, by their names in rg.generation.
        batch_size: pictures at once; their last bits depend on it.
    """

    def __init__(
        self,
        *,
        prompts: Prompts,
        seed: int = 0,
        resolution: int = 64,
        steps: int = 15,
        guidance_scale: float = 2.0,
        scheduler: str = "dpm++",
        batch_size: int = 16,
    ) -> None:
        self.prompts, self.seed, self.resolution, self.scheduler = prompts, seed, resolution, scheduler
        self.batch_size = batch_size
        self.sampling = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
        self.backbone: DiffusionBackbone | None = None

    def attach_backbone(self, backbone: DiffusionBackbone) -> None:
        """Sets the model that is sampled."""
        self.backbone = backbone

    def describe(self, split: str) -> dict[str, Any]:
        return {"crop": "none", "made_by": "the model itself"}

    def count(self, split: str) -> None:
        return None

    def read(self, split: str, indices: Sequence[int]) -> list[SourceSample | Skip]:
        """Raises RuntimeError where no model is attached."""
        if self.backbone is None:
            raise RuntimeError("source: expected attach_backbone before pictures are made")
        pipe, place = self.backbone.pipeline, SPLITS.index(split)
        size = {"height": self.resolution, "width": self.resolution}
        prompts = [self.prompts.at(split, index) for index in indices]
        seeds = image_seeds(self.seed * len(SPLITS) + place, indices)
        own, made = pipe.scheduler, []
        set_scheduler(pipe, self.scheduler)
        try:
            for start in range(0, len(indices), self.batch_size):
                part = slice(start, start + self.batch_size)
                images = generate(pipe, prompts[part], seeds=seeds[part], **size, **self.sampling)
                made += list(to_bytes(images))
        finally:
            pipe.scheduler = own
        return [
            SourceSample(image=image, prompt=prompt, kind="own", seed=(self.seed, place, index))
            for image, prompt, index in zip(made, prompts, indices, strict=True)
        ]
