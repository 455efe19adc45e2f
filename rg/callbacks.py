"""What a training run leaves and shows: its checkpoints, its progress, images and charts, for W&B and as files."""

import hashlib
import io
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import wandb
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from tqdm import tqdm

from rg.cli import refresh_seconds
from rg.heads.base import ReadoutHead
from rg.io.figures import bar_chart, image_grid, save_figure
from rg.io.files import atomic, require_file

log = logging.getLogger(__name__)
# The newest checkpoint of a run, and the one before.
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
MAX_BYTES = 2**40


def digest(content: Any) -> str:
    """64 hexadecimal digits of what a checkpoint holds, the same after it was saved and loaded."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            found.update(f"{len(value)} keys".encode())
            for key in value:
                add(key)
                add(value[key])
        elif isinstance(value, list | tuple):
            found.update(f"{len(value)} values".encode())
            for part in value:
                add(part)
        elif isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(f"{type(value).__name__} {value!r}".encode())

    add(content)
    return found.hexdigest()


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint that `Checkpoints` wrote, and that is as it was written.

    Raises:
        ValueError: the file is damaged or not ours.
    """
    require_file(path, MAX_BYTES)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
        expected, found = content.pop("digest", None), digest(content)
    except Exception as error:  # a damaged file may fail anywhere inside its decoder
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: expected a whole checkpoint of rg.train, found {type(error).__name__}: {reason}"
        ) from error
    if expected != found:
        raise ValueError(
            f"{path}: expected digest {str(expected)[:16]}, found {found[:16]}: damaged, or of an older version"
        )
    return content


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, None where there is none yet; a damaged one is said.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    errors: list[str] = []
    paths = (folder / LAST, folder / PREVIOUS)
    for path in paths if any(path.exists() for path in paths) else ():
        try:
            read_checkpoint(path)
        except ValueError as error:
            errors.append(str(error))
            continue
        for error in errors:
            log.warning("%s; going on from %s", error, path)
        return path
    if errors:
        raise ValueError(f"{'; '.join(errors)}: nothing to go on from, begin anew without resume=true")
    return None


class Checkpoints(TorchCheckpointIO):
    """Checkpoints that carry a digest of themselves and are written whole or not at all; the one before is kept.

    Whenever a run is killed, the newest or the one before is whole, and neither is ever replaced by a damaged one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        with atomic(path) as temporary:
            stream = io.BytesIO()
            torch.save({**checkpoint, "digest": digest(checkpoint)}, stream)
            temporary.write_bytes(stream.getbuffer())  # torch itself would not say that the disk is full
            if path.name == LAST and _is_whole(path):
                with atomic(path.with_name(PREVIOUS)) as copy:
                    shutil.copyfile(path, copy)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """As `read_checkpoint`; nothing is ever unpickled."""
        return read_checkpoint(Path(path), map_location or "cpu")


def _is_whole(path: Path) -> bool:
    try:
        return bool(read_checkpoint(path))
    except ValueError:
        return False


class Progress(ProgressBar):
    """One bar over all steps of a training.

    Args:
        refresh_rate: steps from one look at the loss, which a GPU has to be waited for, to the next.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__()
        self.refresh_rate = refresh_rate
        self.bar = tqdm(disable=True)

    def disable(self) -> None:
        """What Lightning asks of every rank but the first, which `on_train_start` sees to."""

    def on_train_start(self, trainer: Trainer, head: ReadoutHead) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self.bar = tqdm(
            desc="training",
            total=total,
            initial=trainer.global_step,
            mininterval=refresh_seconds(),
            disable=not trainer.is_global_zero,
        )

    def on_train_batch_end(self, trainer: Trainer, head: ReadoutHead, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.refresh_rate == 0 or trainer.global_step == self.bar.total:
            loss = trainer.callback_metrics.get("train/loss", torch.nan)
            self.bar.set_postfix_str(f"loss {float(loss):.4f}", refresh=False)
            self.bar.update(trainer.global_step - self.bar.n)

    def teardown(self, trainer: Trainer, head: ReadoutHead, stage: str) -> None:
        self.bar.close()


class Wandb(WandbLogger):
    """Lightning's logger, without the argument that W&B warns of."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._wandb_init.pop("anonymous", None)


def describe_run(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Gives W&B the whole configuration of a run; Lightning itself tells it the head's hyperparameters alone."""
    for logger in _wandb(trainer):
        logger.experiment.config.update({"settings": settings}, allow_val_change=True)


def publish_head(trainer: Trainer, folder: Path, name: str) -> None:
    """Makes a trained head's folder an artifact of the W&B run."""
    for logger in _wandb(trainer):
        artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"head-{name}"), type="model")
        artifact.add_dir(str(folder))
        logger.experiment.log_artifact(artifact)


def _wandb(trainer: Trainer) -> list[WandbLogger]:
    """The W&B loggers of the process that logs."""
    return [one for one in trainer.loggers if isinstance(one, WandbLogger) and trainer.is_global_zero]


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
    """After each validation: held-out images, their labels, and the readouts at every validated noise level.

    Args:
        folder: gets the images.
        count: images, or groups of them, that are shown.
        batch_size: of these, how many are read at once; None: all.
    """

    def __init__(self, folder: str, count: int = 8, batch_size: int | None = None) -> None:
        super().__init__(folder)
        self.count, self.batch_size = count, batch_size or count
        self.batch: dict[str, Any] | None = None

    def on_validation_batch_end(
        self, trainer: Trainer, head: ReadoutHead, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.batch = None
        held = len(self.batch["index"]) if self.batch else 0
        if held < self.count:
            self.batch = _joined(self.batch, {key: value[: self.count - held] for key, value in batch.items()})

    def on_validation_end(self, trainer: Trainer, head: ReadoutHead) -> None:
        if self.batch is None or not trainer.is_global_zero:
            return
        batch = self.batch
        rows = {name: (batch[name] + 1) / 2 for name in ("image", "label") if name in batch}
        with torch.no_grad():
            for timestep in head.hparams.val_timesteps:
                read = [head.preview(head.readout_at(part, timestep)) for part in _parts(batch, self.batch_size)]
                rows[f"t = {timestep}"] = torch.cat(read)
        for logger in _wandb(trainer):
            columns = [list(_wandb_images(part)) for part in rows.values()]
            logger.log_table("samples", columns=list(rows), data=list(map(list, zip(*columns, strict=True))))
        # The images of a group stand side by side.
        self._publish(trainer, "readouts", image_grid({row: p.flatten(0, -4) for row, p in rows.items()}))


def _wandb_images(images: Tensor) -> Iterator[Any]:
    """Each of images (N, 3, H, W), or groups (N, G, 3, H, W) side by side, in [0, 1] as a cell of a W&B table."""
    for image in images.detach().float().cpu():
        side_by_side = torch.cat(list(image), -1) if image.ndim == 4 else image
        yield wandb.Image(side_by_side.permute(1, 2, 0).clamp(0, 1).numpy())


def _joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two batches as one."""
    if first is None:
        return second
    both = {key: (first[key], value) for key, value in second.items()}
    return {key: torch.cat(pair) if isinstance(pair[0], Tensor) else [*pair[0], *pair[1]] for key, pair in both.items()}


def _parts(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """A batch in parts of at most `size`."""
    starts = range(0, len(batch["index"]), size)
    return [{key: value[start : start + size] for key, value in batch.items()} for start in starts]


class MixingWeights(_Figures):
    """After each validation: how much every tap of the backbone contributes to the readout."""

    def on_validation_end(self, trainer: Trainer, head: ReadoutHead) -> None:
        if not trainer.is_global_zero:
            return
        weights = head.aggregation.mixing_weights.detach().softmax(0).tolist()
        bars = dict(zip(map(str, head.aggregation.taps), weights, strict=True))
        self._publish(trainer, "mixing_weights", bar_chart(bars, x="tap", y="mixing weight"))
