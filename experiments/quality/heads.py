"""How well heads read held-out images, beside a baseline: python -m experiments.quality.heads pose_8k5 depth edge

Each name is an experiment whose head ships, or NAME=FOLDER for the head in a folder. Their data's split "test" is made
where it is missing; nothing else uses it. What is found joins experiments/results/readouts.json and is printed.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.quality.relative import relative_estimates
from experiments.quality.spatial import spatial_estimates
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import CONF, clear_errors
from rg.data.shards import read_shards
from rg.heads import load_head
from rg.heads.base import ReadoutHead
from rg.heads.relative import RelativeHead
from rg.io.files import write_json

RESULTS = Path(__file__).parents[1] / "results" / "readouts.json"


def read_results(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """{head: {metric: {"ours", "low", "high", "baseline", "n", "command"}}}, empty where there is no file.

    Raises:
        ValueError: the file is not such a record.
    """
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text())
        return {head: dict(metrics) for head, metrics in results.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: expected a record {{head: {{metric: ...}}}}: {error}") from error


def estimate(name: str, head: ReadoutHead, world: str, images: int) -> dict[str, dict[str, Any]]:
    """Scores of a head on the first `images` test samples of the data of experiment `name`."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("train", [f"+experiment={name}", f"world={world}"])
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


def run(names: Sequence[str], world: str, images: int, out: Path, command: str) -> str:
    """Scores the heads one after the other; each joins `out` when it is done. Returns their tables."""
    results = read_results(out)
    # Every head is loaded before the first is measured: what is missing is said at once.
    heads = {name.split("=")[0]: load_head(name.split("=")[-1]) for name in names}
    for name, head in heads.items():
        found = estimate(name, head, world, images)
        results[name] = {metric: {**value, "command": command} for metric, value in found.items()}
        write_json(out, results)
    return tables({name: results[name] for name in heads})


@clear_errors
def main() -> None:
    """Measures the heads named and prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m experiments.quality.heads", description=__doc__)
    parser.add_argument("heads", nargs="+", metavar="NAME[=FOLDER]")
    parser.add_argument("--world", default="marionette")
    parser.add_argument("--images", type=int, default=256, help="held-out samples of each head's data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.images < 2:
        parser.error(f"--images: expected at least 2, got {arguments.images}")
    command = shlex.join(["python", "-m", "experiments.quality.heads", *sys.argv[1:]])
    print(run(arguments.heads, arguments.world, arguments.images, arguments.out, command))


if __name__ == "__main__":
    main()
