"""What many tests share: no network, few threads, and a real pipeline small enough to build in every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Heavy libraries are imported by the fixtures that use them: the process of pytest-xdist that hands out the tests loads
# this file too, and nothing else begins before it has.
if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor, nn
    from transformers import CLIPTokenizer

    from rg.guidance.guidance import ReadoutGuidance
    from rg.heads.spatial import SpatialHead

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """On tensors this small more threads take longer."""
    import torch

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
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ROOT / "rg/models/marionette/tokenizer")


@pytest.fixture
def tiny_pipeline(tokenizer: CLIPTokenizer) -> Callable[..., StableDiffusionPipeline]:
    """Makes tiny Stable Diffusion 1 pipelines, see `families.build`: images of 32x32, latents (4,8,8), float32.

    `tiny_pipeline(scheduler=EulerDiscreteScheduler, prediction_type="v_prediction", seed=0)`.
    """
    from tests import families

    return partial(families.build, "sd15", tokenizer)


@pytest.fixture
def tiny_head() -> Callable[..., SpatialHead]:
    """Makes frozen SpatialHeads with random weights for a denoiser's taps: `tiny_head(pipe.unet, variant="rgb")`.

    Their readouts have two cells per cell of the last tap: (B, 3 or 18, 16, 16) for a tiny pipeline.
    """

    import torch

    from rg.backbone.denoiser import tap_channels, time_embed_dim
    from rg.heads.spatial import SpatialHead

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
    """Runs a tiny pipeline to its final latents, see `families.denoise`; all images have one prompt.

    `denoise(pipe, guidance, images=3, steps=4, prompt="a person")`; other arguments are the pipeline's own.
    """
    from tests import families

    def run(
        pipe: StableDiffusionPipeline,
        guidance: ReadoutGuidance | None = None,
        *,
        images: int = 1,
        prompt: str = "a person in a red shirt",
        **arguments: Any,
    ) -> Tensor:
        return families.denoise(pipe, "sd15", guidance, images=images, prompt=[prompt] * images, **arguments)

    return run


@pytest.fixture
def poses() -> Callable[..., Tensor]:
    """Random poses (count, 1, 18, 3) of one visible person each, in a tiny pipeline's images: `poses(3, seed=1)`."""

    import torch

    def draw(count: int, *, seed: int = 0) -> Tensor:
        points = torch.rand(count, 1, 18, 2, generator=torch.Generator().manual_seed(seed)) * 31
        return torch.cat([points, torch.ones(count, 1, 18, 1)], -1)

    return draw


@pytest.fixture(scope="session")
def kill_when() -> Callable[..., None]:
    """Runs a function in another process and kills it as soon as `ready()`: `kill_when(ready, function, argument)`."""

    import torch

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
