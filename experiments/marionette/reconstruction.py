"""What an autoencoder does to pictures: their latents, how good the reconstructions are, and how they look."""

from pathlib import Path

import cv2
import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor
from tqdm import tqdm

from experiments.judge_pictures import from_bytes

CHUNK = 100


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the unscaled latents of pictures (N, 3, H, W) uint8, on the CPU."""
    parts = []
    with tqdm(desc="encoding", total=len(pictures), disable=len(pictures) <= CHUNK) as progress:
        for chunk in pictures.split(CHUNK):
            posterior = vae.encode(from_bytes(chunk.to(vae.device))).latent_dist
            parts.append((posterior.mean.cpu(), posterior.std.cpu()))
            progress.update(len(chunk))
    means, spreads = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(spreads)


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], averaged over pictures."""
    error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


@torch.no_grad()
def quality(vae: AutoencoderKL, pictures: Tensor) -> dict[str, float]:
    """PSNR on pictures (N, 3, H, W) uint8 of what the mean decodes to, and of what a latent drawn around it does."""
    generator = Generator().manual_seed(0)
    columns: dict[str, list[Tensor]] = {"images": [], "mean": [], "sampled": []}
    for chunk in pictures.split(CHUNK):
        mean, spread = encode(vae, chunk)
        sampled = mean + spread * torch.randn(mean.shape, generator=generator)
        columns["images"].append(from_bytes(chunk))
        for name, latents in (("mean", mean), ("sampled", sampled)):
            columns[name].append(vae.decode(latents.to(vae.device)).sample.cpu())
    images, *rest = (torch.cat(parts) for parts in columns.values())
    return {f"psnr_{name}": psnr(decoded, images) for name, decoded in zip(("mean", "sampled"), rest, strict=True)}


def write_grid(path: Path, *rows: Tensor) -> None:
    """Writes rows of pictures (N, 3, H, W) uint8, one under the other, twice as large."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0).flip(-1).cpu().numpy()
    larger = cv2.resize(grid, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    path.write_bytes(cv2.imencode(".png", larger)[1].tobytes())
