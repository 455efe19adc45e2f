"""How well heads read held-out images, beside a baseline: python -m experiments.quality.heads heads=[pose_8k5,depth]

Their data's split "test" is made where it is missing; nothing else uses it. What is found joins
experiments/results/readouts.json and is printed.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig

from experiments.quality.relative import relative_estimates
from experiments.quality.spatial import spatial_estimates
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command, compose_config
from rg.data.shards import read_shards
from rg.heads import load_head
from rg.heads.base import ReadoutHead
from rg.heads.relative import RelativeHead
from rg.io.files import read_json, write_json
from rg.io.records import validate


def read_results(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{head: {metric: {"ours", "low", "high", "baseline", "n", "command"}}}, empty where there is no file.

    Raises:
        ValueError: the file is not such a record.
    """
    if not path.is_file():
        return {}
    # An interval that one sample leaves is endless.
    return validate(dict[str, dict[str, dict[str, Any]]], read_json(path, constants=True), str(path))


def estimate(name: str, head: ReadoutHead, world: str, images: int) -> dict[str, dict[str, Any]]:
    """Scores of a head on the first `images` test samples of the data of experiment `name`."""
    cfg = compose_config("train", [f"+experiment={name}", f"world={world}"])
    backbone: DiffusionBackbone = instantiate(cfg.world.backbone)
    head.attach_backbone(backbone).to(backbone.device)
    instantiate(cfg.data.builder)(split="test", n=images)
    samples = read_shards(Path(cfg.data.root) / "test", images, autoencoder_id=backbone.autoencoder_id)
    measure = relative_estimates if isinstance(head, RelativeHead) else spatial_estimates
    return {metric: asdict(value) for metric, value in measure(head, samples).items()}


def tables(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown, a table per head: a row per score, a column per noise level, "ours (low to high), baseline"."""
    parts = []
    for head, metrics in results.items():
        names = list(dict.fromkeys(metric.rsplit(", t=", 1)[0] for metric in metrics))
        levels = list(dict.fromkeys(metric.rsplit(", t=", 1)[1] for metric in metrics))
        lines = [f"| {head} | {' | '.join(f't = {level}' for level in levels)} |", "|---" * (len(levels) + 1) + "|"]
        for name in names:
            values = [metrics[f"{name}, t={level}"] for level in levels]
            cells = ["{ours:.3f} ({low:.3f} to {high:.3f}), {baseline:.3f}".format(**value) for value in values]
            lines.append(f"| {name}, n = {values[0]['n']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def run(folders: Mapping[str, str | Path], world: str, images: int, out: Path, command_line: str) -> str:
    """Scores heads, experiment -> folder or shipped name; each joins `out` when it is done. Returns their tables."""
    results = read_results(out)
    # Every head is loaded before the first is measured: what is missing is said at once.
    heads = {name: load_head(folder) for name, folder in folders.items()}
    for name, head in heads.items():
        found = estimate(name, head, world, images)
        results[name] = {metric: {**value, "command": command_line} for metric, value in found.items()}
        write_json(out, results)
    return tables({name: results[name] for name in heads})


@command("experiments/heads")
def main(cfg: DictConfig) -> None:
    """Measures the heads named and prints their tables."""
    if not isinstance(cfg.heads, DictConfig | ListConfig):
        raise ValueError(f"heads: expected [pose_8k5,...] or {{pose_100: folder,...}}, got {cfg.heads!r}")
    if cfg.images < 2:
        raise ValueError(f"images: expected at least 2, got {cfg.images}")
    folders = dict(cfg.heads) if isinstance(cfg.heads, DictConfig) else {name: name for name in cfg.heads}
    command_line = shlex.join(["python", "-m", "experiments.quality.heads", *sys.argv[1:]])
    print(run(folders, cfg.world, cfg.images, Path(cfg.out), command_line))


if __name__ == "__main__":
    main()
