"""What a guided evaluation still gets wrong: python -m experiments.quality.errors run=outputs/eval_pck/latest

Needs the run's samples and the shards that it was evaluated on.
"""

from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from rg.cli import command
from rg.data.shards import read_shards
from rg.evaluate import measurable_samples
from rg.io.files import read_json, write_text
from rg.io.records import Record, validate
from rg.metrics.keypoints import box_side
from rg.points import KEYPOINTS, MIRROR
from rg.report import read_record


class Data(Record):
    """Where the images of an evaluation are."""

    root: str


class World(Record):
    """Who judged."""

    judges: list[str]


class Settings(Record):
    """What of an evaluation's settings is read again."""

    data: Data
    world: World
    split: str
    images: int
    alphas: list[float]


class Evaluated(Record):
    """What settings.json holds."""

    settings: Settings


def errors(run_dir: Path, alpha: float = 0.1) -> str:
    """Markdown by judge: errors that swapping left and right would mend, failed images, PCK@alpha by keypoint."""
    path = run_dir / "settings.json"
    settings = validate(Evaluated, read_json(path), str(path)).settings
    samples = measurable_samples(read_shards(Path(settings.data.root) / settings.split, settings.images))
    paths = [run_dir / "samples" / f"{position:05d}.json" for position in range(len(samples))]
    judges = settings.world.judges
    records = [read_record(path, position, settings.alphas, judges) for position, path in enumerate(paths)]
    found = {
        judge: torch.tensor([record["judges"][judge]["guided"]["points"] for record in records]) for judge in judges
    }
    return "\n".join(f"## {judge}\n\n{_errors(points, samples.keypoints, alpha)}" for judge, points in found.items())


def _errors(points: Tensor, keypoints: Tensor, alpha: float) -> str:
    """Of poses (N, P, 18, 2) that should have been keypoints (N, P, 18, 3)."""
    people = (keypoints[..., 2] > 0).any(-1)  # every one of them counts alike
    images, found, keypoints = len(points), points[people], keypoints[people]
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    tolerance = alpha * box_side(target, visible)[:, None]
    right = (found - target).norm(dim=-1) <= tolerance
    swapped = (found[:, list(MIRROR)] - target).norm(dim=-1) <= tolerance
    wrong = visible & ~right
    mended = (wrong & swapped).sum() / wrong.sum().clamp_min(1)
    scores = (right & visible).sum(1) / visible.sum(1)
    by_keypoint = (right & visible).sum(0) / visible.sum(0).clamp_min(1)
    lines = [
        f"{images} images, alpha {alpha}: {wrong.sum() / visible.sum():.1%} of the visible keypoints are wrong; "
        f"{mended:.0%} of these would be right with left and right swapped.",
        f"{(scores >= 0.9).float().mean():.0%} of the people have 90 % of their keypoints right, "
        f"{(scores < 0.5).float().mean():.0%} less than half.",
        "",
        "| keypoint | right | visible in |",
        "|---|---|---|",
        *(
            f"| {name.replace('_', ' ')} | {share:.2f} | {int(count)} |"
            for name, share, count in zip(KEYPOINTS, by_keypoint.tolist(), visible.sum(0), strict=True)
        ),
    ]
    return "\n".join(lines) + "\n"


@command("experiments/errors")
def main(cfg: DictConfig) -> None:
    """Prints the text for the run folder given, and writes errors.md there."""
    run_dir = Path(cfg.run)
    if not (run_dir / "settings.json").is_file():
        raise FileNotFoundError(
            f"run: expected the folder of an evaluation, with settings.json, found none in {run_dir}"
        )
    text = errors(run_dir, cfg.alpha)
    write_text(run_dir / "errors.md", text)
    print(text)


if __name__ == "__main__":
    main()
