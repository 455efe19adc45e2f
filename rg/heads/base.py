"""Readout heads: small networks on the features of a frozen diffusion model (Luo et al., 2024, section 3)."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from lightning import LightningModule
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn

from rg.backbone.denoiser import condition_dim, tap_channels, time_embed_dim
from rg.heads.aggregation import AggregationNetwork
from rg.heads.hub import find_folder, push_head
from rg.heads.protocol import time_embedding
from rg.io.files import atomic, read_json
from rg.io.records import Record, validate
from rg.io.weights import load_network

if TYPE_CHECKING:
    from rg.backbone.diffusion import DiffusionBackbone

TIME_CONVENTIONS = ("direct", "mirrored", "none")


class HeadRecord(Record):
    """What head.json holds."""

    class_name: str = Field(alias="class")
    hyperparameters: dict[str, Any]
    labelled_by: str | None = None


def read_head_record(folder: Path) -> HeadRecord:
    """Reads `folder`/head.json.

    Raises:
        FileNotFoundError: it or head.safetensors is missing.
        ValueError: it is damaged; the message names it, the key, what was expected and what was found.
    """
    for name in ("head.json", "head.safetensors"):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"head={folder}: expected a folder with head.json and head.safetensors, found no {name}"
            )
    path = folder / "head.json"
    return validate(HeadRecord, read_json(path), str(path))


class ReadoutHead(LightningModule):
    """What every head extends: the aggregation network, its training on a frozen backbone, saving and loading.

    A subclass takes its own keyword arguments (plain values: a checkpoint must load with weights_only=True), passes
    the others on, and gives `forward`, `loss`, `metrics`, `preview`, and for guidance `encode_target` and `energy`.

    Args:
        tap_channels: channels of the backbone's taps, in their order.
        time_embed_dim: width of the backbone's time embedding.
        condition_dim: width of the backbone's text embeddings; tells families of equal taps apart. None: unknown.
        projection_dim: channels of the aggregate; norm_groups must divide a quarter of it.
        taps: numbers of the taps that are read, coarse to fine from 0; None: all.
        output_scale: readout cells per cell of the last tap and axis; that is a latent's, in PixArt a patch of them.
        time_convention: index embedded for time t: "direct" t, "mirrored" N - t (the authors' files), "none".
        prompt: the condition under which the backbone's features are read.
        learning_rate, weight_decay, warmup_steps: AdamW; linear warm-up, then cosine decay to zero.
        seed: draws timesteps and noise, together with each sample's index and how often it was seen.
        val_timesteps: noise levels at which held-out images are read.
    """

    def __init__(
        self,
        *,
        tap_channels: list[int],
        time_embed_dim: int,
        condition_dim: int | None = None,
        projection_dim: int = 384,
        norm_groups: int = 32,
        taps: list[int] | None = None,
        output_scale: int = 1,
        time_convention: str = "direct",
        prompt: str = "",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        seed: int = 0,
        val_timesteps: tuple[int, ...] = (50, 300, 600, 850),
    ) -> None:
        super().__init__()
        if projection_dim % (4 * norm_groups):
            raise ValueError(
                f"norm_groups: expected a divisor of projection_dim / 4 = {projection_dim / 4}, got {norm_groups}"
            )
        if time_convention not in TIME_CONVENTIONS:
            raise ValueError(f"time_convention: expected one of {TIME_CONVENTIONS}, got {time_convention!r}")
        self.save_hyperparameters()
        form = {"projection_dim": projection_dim, "norm_groups": norm_groups, "output_scale": output_scale}
        self.aggregation = AggregationNetwork(
            tap_channels=tap_channels, time_embed_dim=time_embed_dim, taps=taps, **form
        )
        self.backbone: DiffusionBackbone | None = None
        # The class of the annotator that made the labels of the training, which should not judge its results.
        self.labelled_by: str | None = None
        # A third faster on CPUs than the default order, for the same numbers.
        self.to(memory_format=torch.channels_last)

    def attach_backbone(self, backbone: "DiffusionBackbone") -> Self:
        """Sets the frozen model whose features this head is trained on."""
        self.check_taps(backbone.tap_channels, backbone.time_embed_dim, backbone.condition_dim)
        self.backbone = backbone
        return self

    def check_taps(self, tap_channels: list[int], time_embed_dim: int, condition_dim: int | None = None) -> None:
        """Raises ValueError when the head was built for another backbone."""
        own = (list(self.hparams.tap_channels), self.hparams.time_embed_dim)
        if own != (list(tap_channels), time_embed_dim):
            raise ValueError(
                f"head {type(self).__name__} was made for a backbone with tap channels {own[0]} and time embedding "
                f"{own[1]}; this one has {list(tap_channels)} and {time_embed_dim}"
            )
        if None not in (self.hparams.condition_dim, condition_dim) and self.hparams.condition_dim != condition_dim:
            raise ValueError(
                f"head {type(self).__name__} was made for another model family with the same taps: it expects text "
                f"embeddings of width {self.hparams.condition_dim}, this backbone's have {condition_dim} "
                "(768 Stable Diffusion 1, 1024 Stable Diffusion 2, 2048 SDXL, 4096 PixArt)"
            )

    def check_denoiser(self, denoiser: nn.Module) -> None:
        """Raises ValueError when the head was built for another denoiser."""
        self.check_taps(tap_channels(denoiser), time_embed_dim(denoiser), condition_dim(denoiser))

    @property
    def prompt(self) -> str:
        """The condition under which the backbone's features are read."""
        return self.hparams.prompt

    @property
    def readout_span(self) -> float | None:
        """Width of the readout's range of values; None where the latent range factor does not apply."""
        return 1.0

    def time_index(self, timesteps: Tensor, num_timesteps: int = 1000) -> Tensor | None:
        """The index whose embedding belongs to timesteps (B,), by the head's time convention."""
        if self.hparams.time_convention == "none":
            return None
        return timesteps if self.hparams.time_convention == "direct" else num_timesteps - timesteps

    def readout(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Readout of clean latents under given noise, through the attached backbone."""
        with torch.no_grad():
            noisy = self.backbone.add_noise(latents, noise, timesteps)
            features = self.backbone.predict(noisy, timesteps, self.hparams.prompt).features
            embedding = time_embedding(self, self.backbone.denoiser, timesteps, self.backbone.num_timesteps)
        return self(features, embedding)

    def sample_noise(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents and noise (B, C, h, w), or (B, G, C, h, w) of groups, and timesteps (B,): of seed, index, draw."""
        latents, noises, timesteps = [], [], []
        for mean, std, index, seen in zip(
            batch["latent_mean"], batch["latent_std"], batch["index"].tolist(), batch["epoch"].tolist(), strict=True
        ):
            # The hash of a tuple of integers is the same in every process, unlike that of a string.
            generator = torch.Generator().manual_seed(hash((self.hparams.seed, index, seen)) % 2**63)
            timesteps.append(torch.randint(self.backbone.num_timesteps, (), generator=generator))
            noises.append(torch.randn(mean.shape, generator=generator))
            latents.append(mean + std * torch.randn(mean.shape, generator=generator).to(std))
        return torch.stack(latents), torch.stack(noises).to(latents[0]), torch.stack(timesteps).to(latents[0].device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.loss(self.readout(*self.sample_noise(batch)), batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def readout_at(self, batch: dict[str, Any], timestep: int) -> Tensor:
        """Readout of a held-out batch at one noise level, the same at every call."""
        timesteps = torch.full_like(batch["epoch"], timestep)
        # Negative counts: no training draw uses them.
        _, noise, _ = self.sample_noise({**batch, "epoch": -2 - timesteps})
        return self.readout(batch["latent_mean"], noise, timesteps)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for timestep in self.hparams.val_timesteps:
            readout = self.readout_at(batch, timestep)
            self.log(f"val/loss_t{timestep}", self.loss(readout, batch), batch_size=len(readout), sync_dist=True)
            self.metrics(readout, batch, timestep)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams.learning_rate, weight_decay=self.hparams.weight_decay
        )
        warmup, total = self.hparams.warmup_steps, self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            decay = 0.5 + 0.5 * math.cos(math.pi * min(step / total, 1.0))
            return min(1.0, (step + 1) / (warmup + 1)) * decay

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def save_pretrained(self, folder: str | Path, *, half: bool = False) -> None:
        """Writes head.safetensors (float32, or half precision) and head.json, both whole or not at all."""
        folder = Path(folder)
        dtype = torch.float16 if half else torch.float32
        tensors = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in self.state_dict().items()}
        record: dict[str, Any] = {"class": type(self).__name__, "hyperparameters": dict(self.hparams)}
        if self.labelled_by is not None:
            record["labelled_by"] = self.labelled_by
        with atomic(folder / "head.json") as settings, atomic(folder / "head.safetensors") as weights:
            weights.write_bytes(save(tensors))
            settings.write_text(json.dumps(record, indent=1) + "\n")

    def push_to_hub(self, repo_id: str, **arguments: Any) -> str:
        """Uploads the head with a model card, see rg.heads.hub.push_head; the address of what was uploaded."""
        return push_head(self, repo_id, **arguments)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Loads a head: frozen, float32, evaluation mode.

        Args:
            folder: where `save_pretrained` wrote it, a shipped one's name, or "owner/name" on the hub.

        Raises:
            FileNotFoundError: there is no such folder or repository, or a file is missing from it.
            ValueError: it holds a head of another class, or a file is damaged or does not fit the other, see
                rg.io.weights.load_network.
        """
        folder = find_folder(folder, "heads")
        record = read_head_record(folder)
        if record.class_name != cls.__name__:
            raise ValueError(f"head={folder}: class: expected a {cls.__name__}, found a {record.class_name}")
        weights = folder / "head.safetensors"
        head = load_network(cls, record.hyperparameters, weights, str(folder / "head.json")).requires_grad_(False)
        head.labelled_by = record.labelled_by
        return head
