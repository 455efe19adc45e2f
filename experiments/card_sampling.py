"""Pictures for the model card: samples kept in parts on disk, renders through the autoencoder, and what they cost."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor
from tqdm import tqdm

from experiments.detector_pictures import from_bytes, to_bytes
from rg.backbone import DiffusionBackbone
from rg.sampling import generate

CHUNK = 100


def model_id(backbone: DiffusionBackbone) -> str:
    """16 hexadecimal digits that name the weights of autoencoder, text encoder and U-Net."""
    digest = hashlib.sha256()
    for module in (backbone.vae, backbone.pipeline.text_encoder, backbone.denoiser):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sample(
    backbone: DiffusionBackbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    name: str,
    batch_size: int,
    **arguments: Any,
) -> Tensor:
    """Samples one picture per prompt and seed: (N, 3, H, W) uint8.

    Every batch is a file in `<folder>/<name>`, called after a hash of all that it depends on: a broken run goes on
    where it stopped, a longer one takes up what a shorter one made.

    Args:
        name: of the set of pictures, for people to read.
        arguments: the pipeline's own, such as num_inference_steps and guidance_scale.
    """
    model, parts = model_id(backbone), []
    (folder / name).mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(prompts), desc=f"sampling {name}", unit="picture") as bar:
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            batch = {"prompts": list(prompts[chosen]), "seeds": list(seeds[chosen])}
            text = json.dumps({"model": model, **arguments, **batch}, sort_keys=True)
            path = folder / name / f"{start:05d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.npz"
            if not path.is_file():
                images = generate(backbone.pipeline, **batch, **arguments)
                partial = path.with_suffix(".partial.npz")
                np.savez(partial, image=to_bytes(images).numpy())
                partial.replace(path)
            with np.load(path, allow_pickle=False) as stored:
                parts.append(torch.from_numpy(stored["image"]))
            bar.update(len(parts[-1]))
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(backbone: DiffusionBackbone, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 decoded from the mean of their latents, and from a sample of them: uint8 both."""
    generator = Generator().manual_seed(seed)
    means, samples = [], []
    for chunk in tqdm(images.split(CHUNK), desc="autoencoder", unit_scale=CHUNK):
        mean, std = (x.cpu() for x in backbone.encode(from_bytes(chunk)))
        means.append(to_bytes(backbone.decode(mean)))
        samples.append(to_bytes(backbone.decode(mean + std * torch.randn(mean.shape, generator=generator))))
    return torch.cat(means), torch.cat(samples)


def latency(
    backbone: DiffusionBackbone, prompts: Sequence[str], *, repeats: int = 3, **arguments: Any
) -> dict[str, float]:
    """Seconds per image of one batch, the fastest of `repeats` (a shared machine only ever adds time).

    Returns:
        {"seconds_per_image", "cpu_seconds_per_image" (of all threads), "batch_size", "threads", and the arguments}.
    """
    times, cpu_times = [], []
    for _ in range(repeats):
        begin, cpu = time.perf_counter(), time.process_time()
        generate(backbone.pipeline, prompts, seeds=range(len(prompts)), **arguments)
        times.append(time.perf_counter() - begin)
        cpu_times.append(time.process_time() - cpu)
    count = len(prompts)
    seconds = {"seconds_per_image": min(times) / count, "cpu_seconds_per_image": min(cpu_times) / count}
    return {**seconds, "batch_size": count, "threads": torch.get_num_threads(), **arguments}
