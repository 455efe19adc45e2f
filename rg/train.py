"""Trains a readout head: python -m rg.train +experiment=pose_100"""

import logging
from contextlib import nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from rg.backbone.diffusion import DiffusionBackbone
from rg.callbacks import LAST, describe_run, finish_wandb, newest_checkpoint, publish_head
from rg.cli import claimed, command, link_latest
from rg.data.datamodule import ReadoutDataModule
from rg.heads.base import ReadoutHead

log = logging.getLogger(__name__)


def train(cfg: DictConfig, run_dir: Path) -> ReadoutHead:
    """Trains the head that `cfg` describes and leaves it in <run_dir>/head; continues a checkpoint found there.

    Raises:
        ValueError: every checkpoint there is damaged, or another process works in run_dir.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    backbone: DiffusionBackbone = instantiate(cfg.world.backbone)
    widths = {name: getattr(backbone, name) for name in ("tap_channels", "time_embed_dim", "condition_dim")}
    head: ReadoutHead = instantiate(cfg.head, **widths, _convert_="all")
    head.attach_backbone(backbone)
    data = instantiate(cfg.data, autoencoder_id=backbone.autoencoder_id)
    trainer = instantiate(cfg.trainer, logger=list(instantiate(cfg.logger).values()))
    backbone.to(trainer.strategy.root_device)
    # Other ranks of this run work beside the first; before the fit their trainers do not know that they are others.
    with claimed(run_dir) if rank_zero_only.rank == 0 else nullcontext():
        describe_run(trainer, OmegaConf.to_container(cfg, resolve=True))
        try:
            fit(trainer, head, data, run_dir)
            if trainer.is_global_zero:
                head.labelled_by = data.labelled_by()
                head.save_pretrained(run_dir / "head")
                log.info("head: %s", run_dir / "head")
            publish_head(trainer, run_dir / "head", cfg.name)
        finally:
            finish_wandb(trainer)
    return head


def fit(trainer: Trainer, module: LightningModule, data: ReadoutDataModule, run_dir: Path) -> None:
    """Trains to the last step from the newest checkpoint in run_dir, leaves one there, and points `latest` at it.

    Raises:
        ValueError: every checkpoint there is damaged.
    """
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is not None:
        log.info("resuming %s", checkpoint)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        if trainer.global_step % (data.epoch_batches * (trainer.check_val_every_n_epoch or 1)):
            trainer.validate(module, data, verbose=False)  # the last steps are not left without a score
    except SystemExit:
        if trainer.interrupted:  # Lightning's answer to Ctrl-C is to exit with 1
            raise KeyboardInterrupt from None
        raise
    trainer.save_checkpoint(run_dir / "checkpoints" / LAST, weights_only=False)
    if trainer.is_global_zero:
        link_latest(run_dir)


@command("train", stopped="the same command with resume=true goes on")
def main(cfg: DictConfig) -> None:
    """Trains in Hydra's run folder."""
    train(cfg, Path(HydraConfig.get().runtime.output_dir))


if __name__ == "__main__":
    main()
