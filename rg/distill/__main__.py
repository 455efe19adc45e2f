"""Makes a readout head an ordinary adapter: python -m rg.distill +experiment=distill_pose head.path=pose_8k5"""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rg.cli import command, load_configured_head
from rg.distill.training import train_adapter, weights_id
from rg.heads.spatial import SpatialHead


def distill(cfg: DictConfig, run_dir: Path) -> Path:
    """Trains the adapter that `cfg` describes on the model's own pictures, as the head reads them; its folder.

    Raises:
        ValueError: a head that reads no map, or one of another family; pictures that were made with other settings, or
            in none of which the head reads anything; see also rg.distill.training.train_adapter.
    """
    head = load_configured_head(cfg.head, cfg.world.family)
    if not isinstance(head, SpatialHead):
        raise ValueError(
            f"head.path={cfg.head.path}: expected a head that reads a map (pose, depth, edges), found a "
            f"{type(head).__name__}"
        )
    if "annotator" in cfg.data.builder and "weights" in cfg.data.builder.annotator:
        cfg.pictures.weights = weights_id(head)
    return train_adapter(cfg, run_dir, head)


@command("distill", stopped="pictures and checkpoints are kept; the same command with resume=true goes on")
def main(cfg: DictConfig) -> None:
    """Distils in Hydra's run folder."""
    distill(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
