"""The frozen diffusion model, for training and evaluation."""

import hashlib

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from rg.hooks import Prediction, embed_time, predict, tap_channels, time_embed_dim
from rg.models import locate


class DiffusionBackbone:
    """A Stable Diffusion pipeline as a feature extractor.

    It is no nn.Module on purpose: a head that holds one neither saves its weights nor flips it to training mode.
    Images are (B, 3, H, W) in [-1, 1]; latents are (B, C, h, w), already multiplied by the VAE's scaling factor;
    timesteps are (B,) integers in [0, num_timesteps).
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.denoiser: nn.Module = pipeline.unet
        self.vae: nn.Module = pipeline.vae
        for module in (self.denoiser, self.vae, pipeline.text_encoder):
            module.eval().requires_grad_(False)
        self.num_timesteps: int = pipeline.scheduler.config.num_train_timesteps
        self.alphas_cumprod: Tensor = pipeline.scheduler.alphas_cumprod
        self.time_embed_dim: int = time_embed_dim(self.denoiser)
        self.tap_channels: list[int] = tap_channels(self.denoiser)
        self.latent_channels: int = self.vae.config.latent_channels
        side = self.denoiser.config.sample_size
        self.latent_size: tuple[int, int] = (side, side)
        self.resolution: tuple[int, int] = (side * pipeline.vae_scale_factor, side * pipeline.vae_scale_factor)
        self.conditions: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, path: str, *, device: str | None = None) -> "DiffusionBackbone":
        """Loads a diffusers folder, or a shipped model by its name, in float32, with the DDIM scheduler.

        device=None takes a CUDA GPU where there is one.

        Raises:
            FileNotFoundError: there is no such folder, or it holds no pipeline.
        """
        folder = locate(path)
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"backbone {folder}: expected a diffusers folder with model_index.json, found none")
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def autoencoder_id(self) -> str:
        """16 hexadecimal digits that name the autoencoder: a hash of its weights and of the scaling factor."""
        digest = hashlib.sha256(repr(self.vae.config.scaling_factor).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> "DiffusionBackbone":
        self.pipeline.to(device)
        self.conditions.clear()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images."""
        posterior = self.vae.encode(images.to(self.device)).latent_dist
        return posterior.mean * self.vae.config.scaling_factor, posterior.std * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [-1, 1]."""
        return self.vae.decode(latents.to(self.device) / self.vae.config.scaling_factor).sample.clamp(-1, 1)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4), one timestep per sample."""
        abar = self.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * latents + (1 - abar).sqrt() * noise

    @torch.no_grad()
    def condition(self, prompt: str) -> Tensor:
        """Text embedding of one prompt: (1, tokens, width)."""
        if prompt not in self.conditions:
            self.conditions[prompt] = self.pipeline.encode_prompt(prompt, self.device, 1, False)[0]
        return self.conditions[prompt]

    def predict(self, x_t: Tensor, timesteps: Tensor, prompt: str = "") -> Prediction:
        """Output and features of noisy latents x_t at timesteps (B,), all under one prompt."""
        condition = self.condition(prompt).expand(len(x_t), -1, -1)
        return predict(self.denoiser, x_t, timesteps, encoder_hidden_states=condition)

    def embed_time(self, index: Tensor) -> Tensor:
        """The denoiser's embedding of time indices (B,): (B, time_embed_dim)."""
        return embed_time(self.denoiser, index)
