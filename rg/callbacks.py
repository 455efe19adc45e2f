"""Images and charts of a training run, for W&B and as files."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from rg.heads.base import ReadoutHead
from rg.io.figures import bar_chart, image_grid, save_figure


def finish_wandb(trainer: Trainer) -> None:
    """Ends the W&B run, so that the next job of a sweep in this process starts one of its own."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


class _Figures(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _publish(self, trainer: Trainer, name: str, figure: Any) -> None:
        path = self.folder / f"{name}-{trainer.global_step:06d}.png"
        save_figure(figure, path)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key=name, images=[str(path)], step=trainer.global_step)


class ReadoutImages(_Figures):
    """After each validation: held-out images, their labels, and the readouts at every validated noise level."""

    def __init__(self, folder: str, count: int = 8) -> None:
        super().__init__(folder)
        self.count = count
        self.batch: dict[str, Any] | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, head: ReadoutHead, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.batch = {key: value[: self.count] for key, value in batch.items()}

    def on_validation_end(self, trainer: Trainer, head: ReadoutHead) -> None:
        if self.batch is None or not trainer.is_global_zero:
            return
        batch = self.batch
        rows = {name: (batch[name] + 1) / 2 for name in ("image", "label") if name in batch}
        with torch.no_grad():
            for timestep in head.hparams.val_timesteps:
                rows[f"t = {timestep}"] = head.preview(head.readout_at(batch, timestep))
        # The images of a group stand side by side.
        self._publish(trainer, "readouts", image_grid({row: p.flatten(0, -4) for row, p in rows.items()}))


class MixingWeights(_Figures):
    """After each validation: how much every tap of the backbone contributes to the readout."""

    def on_validation_end(self, trainer: Trainer, head: ReadoutHead) -> None:
        if not trainer.is_global_zero:
            return
        weights = head.aggregation.mixing_weights.detach().softmax(0).tolist()
        bars = dict(zip(map(str, head.aggregation.taps), weights, strict=True))
        self._publish(trainer, "mixing_weights", bar_chart(bars, x="tap", y="mixing weight"))
