"""The main job on the embedded world, start to end: python -m experiments.demo (make demo)

A guided image from the shipped head, a head trained on 100 images, and its evaluation. Arguments are overrides of
rg.evaluate's configuration; a demo that was broken off goes on where it stopped.
"""

import logging
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from rg.cli import CONF, OUTPUTS, clear_errors, run_folder
from rg.evaluate import evaluate
from rg.sample import sample
from rg.train import train


def _compose(command: str, overrides: list[str], run_dir: Path) -> DictConfig:
    print(f"\n$ python -m rg.{command} {' '.join(overrides)}", flush=True)
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose(config_name=command, overrides=[*overrides, f"run_dir={run_dir}"])


def demo(overrides: list[str], run_dir: Path) -> None:
    """Samples, trains and evaluates in run_dir."""
    world = [override for override in overrides if override.startswith("world=")]
    sample(_compose("sample", ["+experiment=pose_control", *world], run_dir / "picture"), run_dir / "picture")
    training = run_dir / "pose_100"
    train(_compose("train", ["+experiment=pose_100", *world], training), training)
    evaluate(_compose("evaluate", [f"head.path={training / 'head'}", *overrides], run_dir), run_dir)


@clear_errors
def main() -> None:
    """Runs the demo and says where its images are."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    overrides = sys.argv[1:]
    run_dir = Path(OUTPUTS) / run_folder("demo", ",".join(overrides), "unfinished")
    demo(overrides, run_dir)
    print(f"\nImages: {run_dir}/image/grid.png and {run_dir}/grid.png\nTable:    {run_dir}/table.md")


if __name__ == "__main__":
    main()
