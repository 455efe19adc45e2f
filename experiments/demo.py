"""The main job on the embedded world, start to end: python -m experiments.demo (make demo)

A guided image from the shipped head, a head trained on 100 images, and its evaluation; settings are rg.evaluate's.
"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rg.cli import command, compose_config
from rg.evaluate import check_settings, evaluate
from rg.sample import sample
from rg.train import train


def _compose(name: str, overrides: list[str], run_dir: Path) -> DictConfig:
    print(f"\n$ python -m rg.{name} {' '.join(overrides)}", flush=True)
    return compose_config(name, [*overrides, f"run_dir={run_dir}"])


def demo(overrides: list[str], run_dir: Path) -> None:
    """Samples, trains and evaluates in run_dir."""
    world = [override for override in overrides if override.startswith("world=")]
    sample(_compose("sample", ["+experiment=pose_control", *world], run_dir / "image"), run_dir / "image")
    training = run_dir / "pose_100"
    train(_compose("train", ["+experiment=pose_100", *world], training), training)
    evaluate(_compose("evaluate", [f"head.path={training / 'head'}", *overrides], run_dir), run_dir)


@command("demo")
def main(cfg: DictConfig) -> None:
    """Runs the demo and says where its images are."""
    check_settings(cfg)
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    words = [word for word in HydraConfig.get().overrides.task if not word.startswith("resume=")]
    demo(words, run_dir)
    print(f"\nImages: {run_dir}/image/grid.png and {run_dir}/grid.png\nTable:    {run_dir}/table.md")


if __name__ == "__main__":
    main()
