"""The autoencoder of the embedded model: 64 x 64 images to 16 x 16 latents with a learnt standard deviation."""

from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor
from tqdm import tqdm

from experiments.marionette.record import Outcome, is_done, save, write_note
from experiments.marionette.renders import Renders
from experiments.marionette.threads import SpareThreads
from experiments.marionette.trainer import Trainer, mixed_precision
from rg.io.images import from_bytes, to_bytes

LOG_VARIANCE = -6.0  # at the start: a standard deviation of 0.05, small beside latents of about 1
PREVIEWED = 12


def make_autoencoder(widths: list[int], resolution: int, seed: int) -> AutoencoderKL:
    """Random weights of a seed; latents have 4 channels and are 2 ** (len(widths) - 1) times smaller than images."""
    torch.manual_seed(seed)
    levels = len(widths)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=resolution,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = LOG_VARIANCE
    return vae


def slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels along x and y of (B, C, H, W)."""
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def reconstruction_loss(decoded: Tensor, images: Tensor) -> Tensor:
    """Squared error, absolute error, and that of the slopes: edges of thin things weigh more."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(slopes(decoded), slopes(images), strict=True))
    return F.mse_loss(decoded, images) + F.l1_loss(decoded, images) + 0.5 * edges


def loss_of(vae: AutoencoderKL, generator: Generator, *, images: Tensor, batch_size: int, kl_weight: float) -> Tensor:
    """Negative evidence lower bound of a drawn batch, up to constants (Kingma and Welling, 2014, eq. 7).

    The divergence from N(0, 1) is a mean over latent elements; its log-variance part sets the standard deviation.
    """
    rows = torch.randint(len(images), (batch_size,), generator=generator, device=generator.device)
    batch = from_bytes(images[rows])
    with mixed_precision(images.device):
        moments = vae.quant_conv(vae.encoder(batch))
    mean, log_variance = moments.float().chunk(2, 1)
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    with mixed_precision(images.device):
        decoded = vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction_loss(decoded.float(), batch) + kl_weight * divergence


@torch.no_grad()
def preview(vae: AutoencoderKL, path: Path, *, images: Tensor) -> None:
    """Writes images (N, 3, H, W) uint8 above what the means of their latents decode to."""
    mean, _ = encode(vae, images)
    write_grid(path, images, to_bytes(vae.decode(mean.to(vae.device)).sample))


def finish(vae: AutoencoderKL, images: Tensor, held_out: Tensor, folder: Path) -> dict[str, float]:
    """Writes folder/model, of weights that half precision can hold, and the images' latents; returns its quality."""
    vae = vae.half().float()
    mean, std = encode(vae, images)
    scale = 1 / (mean + std * torch.randn(mean.shape, generator=Generator().manual_seed(0))).std().item()
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(folder / "model")
    save(folder / "latents.pt", {"mean": mean * scale, "spread": std * scale})
    return quality(vae, held_out) | {"scaling_factor": scale, "spread": (std * scale).mean().item()}


def train_autoencoder(
    renders: Renders, held_out: Tensor, settings: dict[str, Any], folder: Path, deadline: float
) -> Outcome:
    """Trains on renders, with (N, 3, H, W) uint8 held out; if that is not done yet, the same call continues.

    With settings["start"], the folder of a saved autoencoder, it goes on from that one's weights.
    In the end folder holds model/ (see `finish`), latents.pt (the moments of renders, scaled) and quality.json.
    """
    identity = settings | {"pictures": renders.name}
    done = folder / "quality.json"
    if is_done(done, identity):
        return "done before"
    done.unlink(missing_ok=True)
    network = make_autoencoder(settings["widths"], renders.image.shape[-1], settings["seed"])
    if settings["start"]:
        network.load_state_dict(AutoencoderKL.from_pretrained(settings["start"], local_files_only=True).state_dict())
    network = network.to(settings["device"])
    images = renders.image.to(network.device)
    loss = partial(loss_of, images=images, batch_size=settings["batch_size"], kl_weight=settings["kl_weight"])
    trainer = Trainer(network, loss, identity, folder)
    if not trainer.run(deadline, partial(preview, images=held_out[:PREVIEWED])):
        return "not done yet"
    found = finish(trainer.average, images, held_out, folder)
    trainer.watch.note()
    write_note(done, identity, found)
    print(f"autoencoder: {found}")
    return "done"


CHUNK = 100


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unscaled latents of images (N, 3, H, W) uint8, on the CPU."""
    parts, threads = [], SpareThreads()
    with tqdm(desc="encoding", total=len(images), disable=len(images) <= CHUNK) as progress:
        for chunk in images.split(CHUNK):
            posterior = vae.encode(from_bytes(chunk.to(vae.device))).latent_dist
            parts.append((posterior.mean.cpu(), posterior.std.cpu()))
            progress.update(len(chunk))
            threads.adapt()
    means, stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stds)


def psnr(decoded: Tensor, images: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [-1, 1], averaged over images."""
    error = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).mean().item()


@torch.no_grad()
def quality(vae: AutoencoderKL, originals: Tensor) -> dict[str, float]:
    """PSNR on originals (N, 3, H, W) uint8 of what the mean decodes to, and of what a latent drawn around it does."""
    generator = Generator().manual_seed(0)
    columns: dict[str, list[Tensor]] = {"images": [], "mean": [], "sampled": []}
    for chunk in originals.split(CHUNK):
        mean, std = encode(vae, chunk)
        sampled = mean + std * torch.randn(mean.shape, generator=generator)
        columns["images"].append(from_bytes(chunk))
        for name, latents in (("mean", mean), ("sampled", sampled)):
            columns[name].append(vae.decode(latents.to(vae.device)).sample.cpu())
    images, *rest = (torch.cat(parts) for parts in columns.values())
    return {f"psnr_{name}": psnr(decoded, images) for name, decoded in zip(("mean", "sampled"), rest, strict=True)}


def write_grid(path: Path, *rows: Tensor) -> None:
    """Writes rows of images (N, 3, H, W) uint8, one under the other, twice as large."""
    grid = torch.cat([torch.cat(list(row), 2) for row in rows], 1).permute(1, 2, 0).flip(-1).cpu().numpy()
    larger = cv2.resize(grid, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    path.write_bytes(cv2.imencode(".png", larger)[1].tobytes())
