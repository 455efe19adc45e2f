"""A training of an adapter from a configuration to a folder of diffusers with its card."""

import hashlib
import json
import logging
import shutil
import time
from pathlib import Path

from hydra.utils import instantiate
from lightning import seed_everything
from omegaconf import DictConfig

from rg.backbone.diffusion import DiffusionBackbone
from rg.callbacks import finish_wandb
from rg.cli import claimed
from rg.data.datamodule import ReadoutDataModule
from rg.distill.student import AdapterStudent
from rg.heads.base import ReadoutHead
from rg.io.files import read_text, write_text
from rg.train import fit

log = logging.getLogger(__name__)


def weights_id(head: ReadoutHead) -> str:
    """16 hexadecimal digits that name a head's weights."""
    tensors = sorted(head.state_dict().items())
    return hashlib.sha256(b"".join(t.float().cpu().contiguous().numpy().tobytes() for _, t in tensors)).hexdigest()[:16]


def train_adapter(cfg: DictConfig, run_dir: Path, head: ReadoutHead | None) -> Path:
    """Trains the adapter that `cfg` describes and leaves it in <run_dir>/adapter; continues a checkpoint found there.

    Args:
        cfg: of the command: world, student, data, trainer, logger, seed.
        head: reads the adapted model's features in training; None: nobody does.

    Returns:
        The folder, which `from_pretrained` of diffusers loads, with README.md as its card.

    Raises:
        ValueError: see rg.distill.student.AdapterStudent.attach and rg.train.fit.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    backbone: DiffusionBackbone = instantiate(cfg.world.backbone)
    student: AdapterStudent = instantiate(cfg.student, _convert_="all").attach(backbone, head)
    data: ReadoutDataModule = instantiate(cfg.data, autoencoder_id=backbone.autoencoder_id)
    trainer = instantiate(cfg.trainer, logger=list(instantiate(cfg.logger).values()))
    backbone.to(trainer.strategy.root_device)
    if head is not None:
        head.to(trainer.strategy.root_device).requires_grad_(False)
    begin = time.perf_counter()
    with claimed(run_dir):
        try:
            fit(trainer, student, data, run_dir)
        finally:
            finish_wandb(trainer)
        folder = run_dir / "adapter"
        _save(student, folder)
        count = len(data.train_set)
        minutes = (time.perf_counter() - begin) / 60
        write_text(folder / "README.md", card(cfg, student, count, minutes, head))
    log.info("adapter: %s", folder)
    return folder


def _save(student: AdapterStudent, folder: Path) -> None:
    """Writes the folder under a temporary name, then puts it in place."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    student.adapter.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def card(cfg: DictConfig, student: AdapterStudent, count: int, minutes: float, head: ReadoutHead | None) -> str:
    """What an adapter was made of, in words."""
    adapter, denoiser = student.adapter, student.backbone.denoiser
    own, whole = (sum(p.numel() for p in module.parameters()) for module in (adapter, denoiser))
    source = "labels of a data set" if head is None else f"readings of the head `{cfg.head.path}`"
    lines = [
        f"# {cfg.name}",
        "",
        f"{type(adapter).__name__} of diffusers for `world={cfg.world.name}`: {own:,} parameters, "
        f"{100 * own / whole:.1f} % of the U-Net's. Its control is a picture: {cfg.control_is}.",
        "",
        f"- learnt from: {count:,} pictures with {source}",
        f"- steps: {cfg.trainer.max_steps:,} of {cfg.data.batch_size} pictures, {minutes:.0f} minutes of this run",
        f"- weight of the readout's energy: {student.hparams.energy_weight}, up to t = {student.hparams.energy_until}",
        f"- seed: {cfg.seed}",
    ]
    record = Path(str(cfg.head.path)) / "README.md" if head is not None else None
    if record is not None and record.is_file():
        lines += ["", f"The head says of itself: {read_text(record).splitlines()[2]}"]
    settings = {"kind": student.hparams.kind, "head": None if head is None else weights_id(head), "pictures": count}
    return "\n".join([*lines, "", "```json", json.dumps(settings), "```", ""])
