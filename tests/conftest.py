"""What many tests share: no network, few threads, and a real pipeline small enough to build in every test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import multiprocessing
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rg.backbone.denoiser import tap_channels, time_embed_dim
from rg.guidance.guidance import ReadoutGuidance
from rg.heads.spatial import SpatialHead
from tests.families import make_schedule

ROOT = Path(__file__).parents[1]

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional folder of reference material beside the repository; a test that needs it is skipped without."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> CLIPTokenizer:
    """The tokenizer of the embedded model: 161 tokens."""
    return CLIPTokenizer.from_pretrained(ROOT / "rg/models/marionette/tokenizer")


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
    )


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


@pytest.fixture
def tiny_pipeline(tokenizer: CLIPTokenizer) -> Callable[..., StableDiffusionPipeline]:
    """Makes StableDiffusionPipelines with random weights: images of 32x32, latents (4,8,8), float32, in eval mode.

    `tiny_pipeline(scheduler=EulerDiscreteScheduler, prediction_type="v_prediction", seed=0)`: equal seeds give
    equal weights, and the test's own random state is left alone.
    """

    def build(
        *, scheduler: type[SchedulerMixin] = DDIMScheduler, prediction_type: str = "epsilon", seed: int = 0
    ) -> StableDiffusionPipeline:
        schedule = make_schedule(prediction_type)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet, vae, text_encoder = _unet(), _autoencoder(), _text_encoder(tokenizer)
        pipeline = StableDiffusionPipeline(
            vae=vae.eval(),
            text_encoder=text_encoder.eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=scheduler.from_config(schedule.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def tiny_head() -> Callable[..., SpatialHead]:
    """Makes frozen SpatialHeads with random weights for a denoiser's taps: `tiny_head(pipe.unet, variant="rgb")`.

    Their readouts have two cells per cell of the last tap: (B, 3 or 18, 16, 16) for a tiny pipeline.
    """

    def build(denoiser: nn.Module, *, seed: int = 0, **hyperparameters: Any) -> SpatialHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = SpatialHead(
                tap_channels=tap_channels(denoiser),
                time_embed_dim=time_embed_dim(denoiser),
                **{"projection_dim": 16, "norm_groups": 2, "hidden_channels": 8, "output_scale": 2} | hyperparameters,
            )
        return head.eval().requires_grad_(False)

    return build


@pytest.fixture
def denoise() -> Callable[..., Tensor]:
    """Runs a tiny pipeline to its final latents (B, 4, 8, 8), the same start and generators at every call.

    `denoise(pipe, guidance, images=3, steps=4, prompt="a person")`; other arguments are the pipeline's own.
    """

    def run(
        pipe: StableDiffusionPipeline,
        guidance: ReadoutGuidance | None = None,
        *,
        images: int = 1,
        steps: int = 4,
        prompt: str = "a person in a red shirt",
        **arguments: Any,
    ) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(images)]
        starts = [torch.randn(1, 4, 8, 8, generator=generator) for generator in generators]
        with guidance.attach(pipe) if guidance is not None else nullcontext():
            return pipe(
                [prompt] * images,
                **{"latents": torch.cat(starts), "generator": generators, "guidance_scale": 2.0} | arguments,
                num_inference_steps=steps,
                output_type="latent",
            ).images

    return run


@pytest.fixture
def poses() -> Callable[..., Tensor]:
    """Random poses (count, 1, 18, 3) of one visible person each, in a tiny pipeline's images: `poses(3, seed=1)`."""

    def draw(count: int, *, seed: int = 0) -> Tensor:
        points = torch.rand(count, 1, 18, 2, generator=torch.Generator().manual_seed(seed)) * 31
        return torch.cat([points, torch.ones(count, 1, 18, 1)], -1)

    return draw


@pytest.fixture(scope="session")
def kill_when() -> Callable[..., None]:
    """Runs a function in another process and kills it as soon as `ready()`: `kill_when(ready, function, argument)`."""

    def alone(function: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        function(*arguments, **keywords)

    def run(ready: Callable[[], bool], function: Callable[..., Any], *arguments: Any, **keywords: Any) -> None:
        process = multiprocessing.get_context("fork").Process(target=alone, args=(function, arguments, keywords))
        process.start()
        end = time.monotonic() + 60
        while not ready():
            assert process.is_alive() and time.monotonic() < end
            time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -9

    return run
