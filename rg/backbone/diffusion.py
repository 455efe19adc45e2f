"""The frozen diffusion model, for training and evaluation."""

import hashlib
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderTiny, DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from rg.backbone.conditions import TEXT_ENCODERS, Condition, encode_condition
from rg.backbone.denoiser import check_pipeline, condition_dim, denoiser_of, embed_time, tap_channels, time_embed_dim
from rg.backbone.families import family_of
from rg.backbone.features import Prediction, predict
from rg.backbone.loading import load_pipeline

# Pixels from which images pass the autoencoder one by one: each keeps a GPU busy, and takes 3 GB to decode at 1024 px.
ONE_BY_ONE = 512


class DiffusionBackbone:
    """A pipeline as a feature extractor.

    It is no nn.Module on purpose: a head that holds one neither saves its weights nor flips it to training mode.
    Images are (B, 3, H, W) in [-1, 1]; latents are (B, C, h, w), already multiplied by the VAE's scaling factor;
    timesteps are (B,) integers in [0, num_timesteps).
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        """Takes a text-to-image pipeline of a family of rg.backbone.families; its VAE is kept in float32.

        Raises:
            ValueError: the pipeline has no denoiser with taps.
        """
        check_pipeline(pipeline)
        self.pipeline = pipeline
        self.denoiser: nn.Module = denoiser_of(pipeline)
        self.vae: nn.Module = pipeline.vae
        encoders = (getattr(pipeline, name, None) for name in TEXT_ENCODERS)
        for module in (self.denoiser, self.vae, *filter(None, encoders)):
            module.eval().requires_grad_(False)
        if self.denoiser.dtype != torch.float32:
            keep_float32(self.vae)
        self.num_timesteps: int = pipeline.scheduler.config.num_train_timesteps
        self.flow: bool = family_of(self.denoiser).flow
        self.alphas_cumprod: Tensor | None = None if self.flow else pipeline.scheduler.alphas_cumprod
        self.time_embed_dim: int = time_embed_dim(self.denoiser)
        self.condition_dim: int = condition_dim(self.denoiser)
        self.tap_channels: list[int] = tap_channels(self.denoiser)
        self.latent_channels: int = self.vae.config.latent_channels
        side = self.denoiser.config.get("sample_size") or pipeline.default_sample_size
        self.latent_size: tuple[int, int] = (side, side)
        self.resolution: tuple[int, int] = (side * pipeline.vae_scale_factor, side * pipeline.vae_scale_factor)
        if max(self.resolution) >= ONE_BY_ONE:
            self.vae.enable_slicing()
        self.conditions: dict[str, Condition] = {}

    @classmethod
    def from_pretrained(
        cls, path: str, *, device: str | None = None, precision: str = "float32", variant: str | None = None
    ) -> "DiffusionBackbone":
        """Loads a pipeline with the DDIM scheduler; one of a flow-matching model keeps its own.

        Args:
            path: a diffusers folder, a shipped model's name, "owner/name" on the hub, or a single file of safetensors.
            device: None takes a CUDA GPU where there is one.
            precision: of the denoiser and the text encoders: float32, bfloat16 or float16.
            variant: which of several files of weights, such as "fp16".

        Raises:
            FileNotFoundError: there is no such folder, the hub does not answer, or a file is missing.
            ValueError: it holds no pipeline that guidance knows, or a file is damaged.
        """
        pipeline = load_pipeline(path, precision=precision, variant=variant)
        check_pipeline(pipeline)
        if not family_of(denoiser_of(pipeline)).flow:
            # What a scheduler of another kind does not say (clipping), or DDIM cannot follow or invert (its spacing).
            settings = {"clip_sample": False, **pipeline.scheduler.config}
            if settings.get("timestep_spacing") == "linspace":
                settings["timestep_spacing"] = "trailing"
            pipeline.scheduler = DDIMScheduler.from_config(settings)
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @property
    def autoencoder_id(self) -> str:
        """16 hexadecimal digits that name the autoencoder: a hash of its weights, and of how its latents are scaled."""
        scale = self.vae.config.scaling_factor
        digest = hashlib.sha256(repr((scale, self._shift) if self._shift else scale).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def to(self, device: torch.device | str) -> "DiffusionBackbone":
        self.pipeline.to(device)
        self.conditions.clear()
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images, in float32; of an autoencoder without a deviation
        (TAESD, SANA's) the latents and zero.

        Raises:
            FloatingPointError: the VAE overflows.
        """
        encoded, factor = self.vae.encode(images.to(self.device)), self.vae.config.scaling_factor
        if isinstance(self.vae, AutoencoderTiny | AutoencoderDC):
            latents = self._finite(encoded[0]) * factor
            return latents, torch.zeros_like(latents)
        posterior = encoded.latent_dist
        return (self._finite(posterior.mean) - self._shift) * factor, posterior.std * factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, clamped to [-1, 1], in float32; raises FloatingPointError where the VAE overflows."""
        images = self.vae.decode(latents.to(self.device) / self.vae.config.scaling_factor + self._shift).sample
        return self._finite(images).clamp(-1, 1)

    @property
    def _shift(self) -> float:
        """What is taken off the autoencoder's latents before they are scaled; TAESD's are scaled already."""
        if isinstance(self.vae, AutoencoderTiny):
            return 0.0
        return self.vae.config.get("shift_factor") or 0.0

    def _finite(self, values: Tensor) -> Tensor:
        if not values.isfinite().all():
            raise FloatingPointError(f"vae: expected finite values, got nan or inf in {values.dtype}: weights or input")
        return values

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al., 2020, eq. 4), one timestep per sample; of a
        flow-matching model (1 - s) x_0 + s noise with s = t / num_timesteps (Lipman et al., 2023)."""
        if self.flow:
            level = (timesteps.to(latents) / self.num_timesteps).view(-1, 1, 1, 1)
            return (1 - level) * latents + level * noise
        abar = self.alphas_cumprod.to(latents)[timesteps].view(-1, 1, 1, 1)
        return abar.sqrt() * latents + (1 - abar).sqrt() * noise

    def condition(self, prompt: str) -> Condition:
        """Embeddings of one prompt, made once."""
        if prompt not in self.conditions:
            self.conditions[prompt] = encode_condition(self.pipeline, prompt, self.device)
        return self.conditions[prompt]

    def predict(self, x_t: Tensor, timesteps: Tensor, prompt: str = "") -> Prediction:
        """Output and features of noisy latents x_t at timesteps (B,), all under one prompt, in float32."""
        factor = self.pipeline.vae_scale_factor
        x_t = x_t.to(self.denoiser.dtype)
        inputs = self.condition(prompt).inputs(len(x_t), (x_t.shape[-2] * factor, x_t.shape[-1] * factor), x_t)
        prediction = predict(self.denoiser, x_t, timesteps, **inputs)
        output = prediction.output[:, : self.latent_channels].float()
        return Prediction(output, [feature.float() for feature in prediction.features])

    def embed_time(self, index: Tensor) -> Tensor:
        """The denoiser's embedding of time indices (B,): (B, time_embed_dim), in float32."""
        return embed_time(self.denoiser, index).float()


def keep_float32(vae: nn.Module) -> None:
    """Casts an autoencoder to float32, and whatever enters it: pipelines hand it tensors of the denoiser's dtype."""
    vae.float()

    def cast(_module: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value.float() if isinstance(value, Tensor) else value for value in given)

    for name in ("encoder", "post_quant_conv", "decoder"):
        module = getattr(vae, name, None)
        if module is not None:
            module.register_forward_pre_hook(cast)
