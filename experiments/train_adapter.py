"""An adapter that learns from exact labels: python -m experiments.train_adapter kind=t2i_adapter data.size=100"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rg.cli import command, load_configured_head
from rg.distill.training import train_adapter


@command("experiments/train_adapter", stopped="the same command with resume=true goes on")
def main(cfg: DictConfig) -> None:
    """Trains in Hydra's run folder; with a student.energy_weight above 0 the head reads along."""
    head = load_configured_head(cfg.head, cfg.world.family) if cfg.student.energy_weight else None
    train_adapter(cfg, Path(HydraConfig.get().runtime.output_dir), head)


if __name__ == "__main__":
    main()
