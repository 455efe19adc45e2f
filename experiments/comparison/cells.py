"""One cell of the comparison: an evaluation whose images without guidance are shared, and what is measured of it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from rg.backbone.denoiser import denoiser_of, taps
from rg.evaluate import Evaluation
from rg.guidance.guidance import ReadoutGuidance
from rg.io.files import read_json, write_json

CONDITIONS = ("unguided", "guided")


@dataclass(frozen=True)
class Measured:
    """What a cell says, of `unguided` and `guided` images.

    scores: condition -> score ("PCK@0.1 JUDGE", "words") -> of each image (N,), nan where it does not apply.
    images: condition -> (N, 3, H, W) in [-1, 1]. kernel: condition -> distance, empty where there are too few images.
    calls: "forward" and "backward": rows of the denoiser for each guided image. seconds: condition -> for each image.
    """

    scores: dict[str, dict[str, Tensor]]
    images: dict[str, Tensor]
    kernel: Mapping[str, float]
    calls: Mapping[str, float]
    seconds: Mapping[str, float]


class Cell(Evaluation):
    """An evaluation that takes its images without guidance from another of the same seeds, where those are made.

    Args:
        plain: run folder of that evaluation, or this one's own.
    """

    def __init__(self, cfg: DictConfig, run_dir: Path, plain: Path) -> None:
        super().__init__(cfg, run_dir)
        self.plain = plain / "samples"

    def __reduce__(self) -> tuple[Any, ...]:
        return Cell, (*super().__reduce__()[1], self.plain.parent)

    def make(
        self,
        prompts: Sequence[str],
        guidance: ReadoutGuidance | None,
        positions: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1]; of guided ones calls.json says what they took."""
        if guidance is not None:
            with counted(denoiser_of(self.backbone.pipeline)) as calls:
                images = super().make(prompts, guidance, positions, arguments)
            write_json(self.run_dir / "calls.json", {name: count / len(images) for name, count in calls.items()})
            return images
        others = [self.plain / self.image_path(position, "unguided").name for position in positions]
        if self.plain != self.run_dir / "samples" and all(path.is_file() for path in others):
            return torch.stack([self.read_image(path) for path in others])
        return super().make(prompts, None, positions, arguments)


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[Counter[str]]:
    """Counts the rows that pass forward, and those that pass back, through a denoiser inside the context."""
    rows = Counter(forward=0, backward=0)

    def count(_tap: nn.Module, _given: tuple[Any, ...], output: Tensor) -> None:
        rows["forward"] += len(output)
        if output.requires_grad:
            output.register_hook(lambda gradient: rows.update(backward=len(gradient)))

    handle = next(iter(taps(denoiser).values())).register_forward_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def measure(cell: Cell) -> Measured:
    """Runs a cell, as far as it is missing, and measures it."""
    results = cell.run()
    records = [cell.read(position) for position in range(len(cell.samples))]
    images = {condition: cell.images(condition) for condition in CONDITIONS}
    scores = {condition: pck_of(records, condition) for condition in CONDITIONS}
    nobody = dict.fromkeys(CONDITIONS, torch.full((len(records),), float("nan")))
    for condition, right in (cell.words or nobody).items():
        scores[condition]["words"] = right
    seconds = {condition: value / len(records) for condition, value in results["seconds"].items()}
    calls = read_json(cell.run_dir / "calls.json")
    return Measured(scores, images, results["kernel_distance"] or {}, calls, seconds)


def pck_of(records: Sequence[Mapping[str, Any]], condition: str) -> dict[str, Tensor]:
    """PCK of each image by every tolerance and judge, "PCK@0.1" or "PCK@0.1 JUDGE" where judges have names: (N,)."""
    found: dict[str, list[float]] = {}
    for record in records:
        judges = {f" {name}": verdict for name, verdict in record["judges"].items()} if "judges" in record else None
        for judge, verdict in (judges or {"": record}).items():
            for alpha, value in verdict[condition]["pck"]["target"].items():
                found.setdefault(f"PCK@{alpha}{judge}", []).append(float("nan") if value is None else value)
    return {name: torch.tensor(values) for name, values in found.items()}
