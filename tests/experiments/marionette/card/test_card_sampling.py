from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from experiments.marionette.card.measure import latency, model_id, reconstruct, sample
from rg.backbone.diffusion import DiffusionBackbone

PROMPTS = ["a person in a red shirt", "a person on grass", "a portrait"]


def test_samples_are_kept_and_taken_up(tiny_pipeline: Callable[..., StableDiffusionPipeline], tmp_path: Path):
    backbone = DiffusionBackbone(tiny_pipeline())
    settings = {"name": "few", "batch_size": 2, "num_inference_steps": 2, "guidance_scale": 1.0}
    images = sample(backbone, PROMPTS, [7, 8, 9], tmp_path, **settings)
    files = sorted((tmp_path / "few").glob("*.npz"))
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8 and len(files) == 2
    made = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()  # as if it had been stopped after the first batch
    assert torch.equal(sample(backbone, PROMPTS, [7, 8, 9], tmp_path, **settings), images)
    assert files[0].stat().st_mtime_ns == made[0] and files[1].stat().st_mtime_ns > made[1]
    # An image depends on its prompt and seed, not on its batch.
    alone = sample(backbone, PROMPTS[2:], [9], tmp_path, **{**settings, "name": "alone"})
    assert (alone[0].int() - images[2].int()).abs().max() <= 1


def test_other_settings_and_weights_are_sampled_anew(
    tiny_pipeline: Callable[..., StableDiffusionPipeline], tmp_path: Path
):
    backbone, other = DiffusionBackbone(tiny_pipeline()), DiffusionBackbone(tiny_pipeline(seed=1))
    assert model_id(backbone) == model_id(DiffusionBackbone(tiny_pipeline())) != model_id(other)
    settings = {"name": "few", "batch_size": 1, "num_inference_steps": 2}
    for model, scale in ((backbone, 1.0), (backbone, 2.0), (other, 1.0), (backbone, 1.0)):
        sample(model, PROMPTS[:1], [0], tmp_path, guidance_scale=scale, **settings)
    assert len(list((tmp_path / "few").glob("*.npz"))) == 3


def test_reconstructions_of_mean_and_sample_differ_by_the_noise(
    tiny_pipeline: Callable[..., StableDiffusionPipeline],
):
    backbone = DiffusionBackbone(tiny_pipeline())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, drawn = reconstruct(backbone, images, seed=0)
    again, redrawn = reconstruct(backbone, images, seed=0)
    assert torch.equal(mean, again) and torch.equal(drawn, redrawn) and not torch.equal(mean, drawn)


def test_latency_says_what_was_timed(tiny_pipeline: Callable[..., StableDiffusionPipeline]):
    found = latency(
        DiffusionBackbone(tiny_pipeline()), PROMPTS[:2], repeats=1, num_inference_steps=1, guidance_scale=2.0
    )
    assert found.pop("seconds_per_image") > 0 and found.pop("cpu_seconds_per_image") > 0
    assert found == {"batch_size": 2, "threads": torch.get_num_threads(), "num_inference_steps": 1, "guidance_scale": 2}
