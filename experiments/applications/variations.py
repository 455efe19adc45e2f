"""How alike variations look and how their poses differ, by strength: python -m experiments.applications.variations

After every reference images are made from new noise under a prompt that says nothing of its looks. What they keep is
what a classifier reads that knows nothing of heads; how they differ, the places where detectors find their keypoints.
"""

import shlex
import sys
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from experiments.applications.bench import Bench, Heads, check_methods, publish
from rg.cli import claimed, command
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import ReferenceTarget

GRID = 6
CLOTHES = ("shirt", "trousers")


def terms(heads: Heads, rows: slice) -> list[GuidanceTerm]:
    """The energies of relative heads on whole images; every reference's target is recorded in its row."""
    return [GuidanceTerm(head, ReferenceTarget(), weight) for head, weight in heads]


def pose_diversity(points: Tensor) -> Tensor:
    """Mean distance between the keypoints of two of the R images after each reference: (R, B, K, 2) -> (B,) pixels."""
    pairs = list(combinations(range(len(points)), 2))
    return torch.stack([(points[a] - points[b]).norm(dim=-1).mean(-1) for a, b in pairs]).mean(0)


def score(bench: Bench, images: Tensor) -> dict[str, list[float]]:
    """Of the images (R, B, 3, H, W) after each reference, means over R: shares of all attributes and of the clothes'
    colours that are the reference's, distance of the classifier's features (1 - cosine), and diversity of poses."""
    reference = bench.classifier.embed(bench.given)
    distances = [1 - F.cosine_similarity(bench.classifier.embed(row), reference) for row in images]
    scores = {
        "attributes kept": torch.stack([bench.attributes_kept(row) for row in images]).mean(0),
        "clothes kept": torch.stack([bench.attributes_kept(row, CLOTHES) for row in images]).mean(0),
        "appearance distance": torch.stack(distances).mean(0),
    }
    for name, detector in bench.detectors.items():
        points = torch.stack([detector.detect(row).points[:, 0] for row in images])
        scores[f"pose diversity, {name}"] = pose_diversity(points)
    return {name: values.tolist() for name, values in scores.items()}


def run(cfg: DictConfig, run_dir: Path, command_line: str) -> str:
    """Makes and scores what is missing of all methods; writes results.json, table.md, grid.png; returns the table.

    Raises:
        ValueError: see `check_methods`; fewer than two rounds, of which nothing differs.
    """
    methods = check_methods(cfg.methods)
    if cfg.rounds < 2:
        raise ValueError(f"rounds: expected at least 2, got {cfg.rounds}")
    with claimed(run_dir):
        bench = Bench(cfg, run_dir)
        prompts = bench.samples.prompt if cfg.prompt is None else [cfg.prompt] * len(bench.samples)
        images = {
            name: bench.make(name, method, terms, prompts=prompts, rounds=cfg.rounds)
            for name, method in methods.items()
        }
        scores = {name: score(bench, made) for name, made in images.items()}
        grid = {"reference": (bench.given[:GRID] + 1) / 2}
        grid |= {f"{name}, {r + 1}": (made[r, :GRID] + 1) / 2 for name, made in images.items() for r in range(2)}
        return publish(bench, scores, next(iter(scores)), ["attributes", "clothes"], grid, command_line)


@command("experiments/variations")
def main(cfg: DictConfig) -> None:
    """Measures every method of the configuration and prints the table."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    print(run(cfg, run_dir, shlex.join(["python", "-m", "experiments.applications.variations", *sys.argv[1:]])))
    print(f"{run_dir}/grid.png")


if __name__ == "__main__":
    main()
