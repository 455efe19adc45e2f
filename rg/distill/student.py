"""An adapter that learns from pictures and their controls, on a frozen model."""

import math
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from rg.backbone.features import Prediction, predict
from rg.distill.networks import make_adapter, residuals
from rg.heads.base import ReadoutHead
from rg.heads.protocol import time_embedding

if TYPE_CHECKING:
    from rg.backbone.diffusion import DiffusionBackbone


class AdapterStudent(LightningModule):
    """Trains a T2I-Adapter or a ControlNet by the denoising loss, and by what a head reads of the adapted model.

    The loss is the squared error of the model's output plus `energy_weight` times the mean energy of the head's
    readout on the same call's features, for timesteps up to `energy_until` alone: above it little can be read. A
    control is a batch's label: a drawn skeleton, or a map.

    Args:
        kind: one of rg.distill.networks.KINDS.
        blocks, middle: of a T2I-Adapter, see rg.distill.networks.make_adapter.
        energy_weight: 0 trains by the denoising loss alone.
        energy_until: the last timestep at which the head is asked.
        empty: share of prompts left out, as text guidance also asks the adapted model without one.
        learning_rate, weight_decay, warmup_steps: as of rg.heads.base.ReadoutHead.
        seed: draws timesteps, noise and left-out prompts, together with each sample's index and how often it was seen.
        val_timesteps: noise levels at which held-out pictures are denoised.
    """

    def __init__(
        self,
        *,
        kind: str = "t2i_adapter",
        blocks: int = 1,
        middle: bool = False,
        energy_weight: float = 1.0,
        energy_until: int = 920,
        empty: float = 0.15,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-3,
        warmup_steps: int = 30,
        seed: int = 0,
        val_timesteps: tuple[int, ...] = (300, 600, 850),
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone: DiffusionBackbone | None = None
        self._teachers: list[ReadoutHead] = []  # in a list: its weights are no part of this module

    def attach(self, backbone: "DiffusionBackbone", head: ReadoutHead | None) -> Self:
        """Sets the frozen model, and the head that reads it, and makes the adapter.

        Raises:
            ValueError: an energy is asked for without a head, a head of another family, see also `make_adapter`.
        """
        if head is None and self.hparams.energy_weight:
            raise ValueError(f"energy_weight: expected 0 where no head reads, got {self.hparams.energy_weight}")
        if head is not None:
            head.attach_backbone(backbone)
        self.backbone, self._teachers = backbone, [head] if head is not None else []
        pixels = backbone.resolution[0] // backbone.latent_size[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.hparams.seed)
            form = {"pixels": pixels, "blocks": self.hparams.blocks, "middle": self.hparams.middle}
            self.adapter = make_adapter(self.hparams.kind, backbone.denoiser, **form)
        return self

    def draw(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """Latents and noise (B, C, h, w), timesteps (B,) and prompts, some left out: of seed, index, draw."""
        latents, noises, timesteps, prompts = [], [], [], []
        counts = (batch["index"].tolist(), batch["epoch"].tolist(), batch["prompt"])
        rows = zip(batch["latent_mean"], batch["latent_std"], *counts, strict=True)
        for mean, std, index, seen, prompt in rows:
            generator = torch.Generator().manual_seed(hash((self.hparams.seed, index, seen)) % 2**63)
            timesteps.append(torch.randint(self.backbone.num_timesteps, (), generator=generator))
            prompts.append("" if torch.rand((), generator=generator) < self.hparams.empty else prompt)
            noises.append(torch.randn(mean.shape, generator=generator))
            latents.append(mean + std * torch.randn(mean.shape, generator=generator).to(std))
        latent = torch.stack(latents)
        return latent, torch.stack(noises).to(latent), torch.stack(timesteps).to(latent.device), prompts

    def predict(self, x_t: Tensor, timesteps: Tensor, prompts: list[str], control: Tensor) -> Prediction:
        """The adapted model's output and features, in float32; control: (B, 3, H, W) in [-1, 1]."""
        backbone = self.backbone
        sample = x_t.to(backbone.denoiser.dtype)
        parts = [backbone.condition(prompt).inputs(1, tuple(control.shape[-2:]), sample) for prompt in prompts]
        inputs = _joined(parts)
        added = residuals(self.adapter, (control + 1) / 2, sample, timesteps, inputs)
        found = predict(backbone.denoiser, sample, timesteps, **inputs, **added)
        output = found.output[:, : backbone.latent_channels].float()
        return Prediction(output, [feature.float() for feature in found.features])

    def losses(self, batch: dict[str, Any], drawn: tuple[Tensor, Tensor, Tensor, list[str]]) -> tuple[Tensor, Tensor]:
        """The denoising loss and the mean energy of a batch, 0 without a head."""
        latents, noise, timesteps, prompts = drawn
        found = self.predict(self.backbone.add_noise(latents, noise, timesteps), timesteps, prompts, batch["label"])
        denoising = F.mse_loss(found.output, self.target(latents, noise, timesteps))
        readable = timesteps <= self.hparams.energy_until
        if not self._teachers or not readable.any():
            return denoising, denoising.new_zeros(())
        (head,) = self._teachers
        embedding = time_embedding(head, self.backbone.denoiser, timesteps, self.backbone.num_timesteps)
        readout = head(found.features, embedding)
        sizes = {"readout_size": tuple(readout.shape[-2:]), "image_size": tuple(batch["label"].shape[-2:])}
        energy = head.energy(readout, head.encode_target(head.control(batch), **sizes))
        return denoising, (energy * readable).sum() / readable.sum()

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model's output should be: the noise, or v = sqrt(abar) noise - sqrt(1 - abar) x_0."""
        if self.backbone.pipeline.scheduler.config.prediction_type != "v_prediction":
            return noise
        abar = self.backbone.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * noise - (1 - abar).sqrt() * latents

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        denoising, energy = self.losses(batch, self.draw(batch))
        loss = denoising + self.hparams.energy_weight * energy
        self.log_dict({"train/loss": loss, "train/denoising": denoising, "train/energy": energy}, prog_bar=False)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        for timestep in self.hparams.val_timesteps:
            times = torch.full_like(batch["epoch"], timestep)
            # Negative counts: no training draw uses them.
            latents, noise, _, _ = self.draw({**batch, "epoch": -2 - times})
            found = self.losses(batch, (latents, noise, times, batch["prompt"]))
            for name, value in zip(("denoising", "energy"), found, strict=True):
                self.log(f"val/{name}_t{timestep}", value, batch_size=len(times), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        hparams, total = self.hparams, self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(
            self.adapter.parameters(), lr=hparams.learning_rate, weight_decay=hparams.weight_decay
        )

        def factor(step: int) -> float:
            decay = 0.5 + 0.5 * math.cos(math.pi * min(step / total, 1.0))
            return min(1.0, (step + 1) / (hparams.warmup_steps + 1)) * decay

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of several calls of one row as those of one call."""
    first = parts[0]
    return {
        name: _joined([part[name] for part in parts])
        if isinstance(value, dict)
        else torch.cat([part[name] for part in parts])
        for name, value in first.items()
    }
