"""What a world's jobs hold at once, counted without a GPU: python -m experiments.benchmark.memory world=sdxl

Every tensor that is alive is counted, of labelling, editing, sampling and validation, with the batch sizes of the world
and beside all its weights; the working memory of kernels and of the CUDA context comes on top.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.benchmark.architectures import (
    TEXT_PARAMETERS,
    TOKENS,
    count_parameters,
    make_autoencoder,
    make_denoiser,
)
from experiments.benchmark.counting import default_dtype
from rg.backbone.conditions import Condition
from rg.backbone.denoiser import condition_dim, tap_channels, time_embed_dim
from rg.backbone.diffusion import ONE_BY_ONE
from rg.backbone.features import predict
from rg.backbone.loading import PRECISIONS
from rg.cli import command
from rg.heads.base import ReadoutHead


@dataclass
class Held:
    """Bytes of the storages that a computation makes: of all at once, the most of these, the largest of a tensor."""

    now: int = 0
    peak: int = 0
    largest: int = 0
    seen: dict[int, Any] = field(default_factory=dict)


class _Watch(TorchDispatchMode):
    def __init__(self, held: Held) -> None:
        super().__init__()
        self.held = held

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        held, key, nbytes = self.held, storage._cdata, storage.nbytes()
        if key in held.seen:
            return

        def freed() -> None:
            if held.seen.pop(key, None) is not None:
                held.now -= nbytes

        held.seen[key] = weakref.finalize(storage, freed)
        held.now += nbytes
        held.peak, held.largest = max(held.peak, held.now), max(held.largest, nbytes)


@contextmanager
def held_memory(weights: Iterable[Tensor] = ()) -> Iterator[Held]:
    """Counts what tensors made inside the context hold while they are alive; views of `weights` are no new ones."""
    held = Held()
    held.seen = {weight.untyped_storage()._cdata: None for weight in weights}
    with _Watch(held):
        yield held


def weights_bytes(model: str, itemsize: int, parts: Sequence[nn.Module], head: nn.Module) -> int:
    """Of denoiser and text encoders at `itemsize` bytes a number, autoencoder and head in float32."""
    denoiser, autoencoder = map(count_parameters, parts)
    return (denoiser + TEXT_PARAMETERS[model]) * itemsize + 4 * (autoencoder + count_parameters(head))


class Jobs:
    """The parts of a published world on fake tensors, and the peak bytes beside the weights of what is done with them.

    Args:
        cfg: as of conf/memory.yaml.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, model = cfg, cfg.world.name
        self.dtype = PRECISIONS[cfg.world.backbone.get("precision", "float32")]
        # The head is real: torch cannot change the layout of fake weights.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            with default_dtype(self.dtype):
                self.denoiser = make_denoiser(model).eval().requires_grad_(False)
            self.vae = make_autoencoder(model).eval().requires_grad_(False)
        self.side = self.denoiser.config.sample_size
        self.image = cfg.world.resolution
        if self.image >= ONE_BY_ONE:
            self.vae.enable_slicing()
        widths = {"tap_channels": tap_channels(self.denoiser), "time_embed_dim": time_embed_dim(self.denoiser)}
        self.head: ReadoutHead = instantiate(cfg.head, **widths, _convert_="all")
        self.weights = weights_bytes(model, self.dtype.itemsize, (self.denoiser, self.vae), self.head)

    def condition(self) -> Condition:
        """Embeddings as long and wide as a prompt's."""
        if self.cfg.world.family == "pixart":
            return Condition(torch.randn(1, 300, self.denoiser.config.caption_channels), None, torch.ones(1, 300))
        pooled = torch.randn(1, 1280) if self.denoiser.config.addition_embed_type else None
        return Condition(torch.randn(1, TOKENS, condition_dim(self.denoiser)), pooled)

    def read(self, rows: int, *, steer: bool = False, learn: bool = False) -> int:
        """Features and readout of rows; `steer`: and the gradient at the input, `learn`: at the head's weights."""
        self.head.requires_grad_(learn)
        with self.mode, held_memory([*self.denoiser.parameters(), *self.head.parameters()]) as held:
            x = torch.randn(rows, 4, self.side, self.side, dtype=self.dtype, requires_grad=steer)
            inputs = self.condition().inputs(rows, (self.image, self.image), x)
            with torch.set_grad_enabled(steer):
                features = predict(self.denoiser, x, torch.full((rows,), 500), **inputs).features
                features = [feature.float() for feature in features]
            with torch.set_grad_enabled(steer or learn):
                readout = self.head(features, torch.randn(rows, self.head.hparams.time_embed_dim))
            if steer or learn:
                wanted = [x] if steer else list(self.head.parameters())
                torch.autograd.grad(readout.square().sum(), wanted, allow_unused=True)
        return held.peak

    def encode(self, images: int) -> int:
        with self.mode, torch.no_grad(), held_memory(self.vae.parameters()) as held:
            self.vae.encode(torch.randn(images, 3, self.image, self.image))
        return held.peak

    def decode(self, images: int) -> int:
        with self.mode, torch.no_grad(), held_memory(self.vae.parameters()) as held:
            self.vae.decode(torch.randn(images, 4, self.side, self.side))
        return held.peak

    def peaks(self) -> dict[str, int]:
        """Bytes beside the weights, by job."""
        world = self.cfg.world
        edits = max(self.read(2 * world.edit_batch), self.decode(world.edit_batch))
        return {
            f"labels of {world.encode_batch}": self.encode(world.encode_batch),
            f"labels by SDEdit of {world.edit_batch}": edits,
            f"guided images of {world.batch_size}": max(
                self.read(world.batch_size, steer=True), self.read(2 * world.batch_size), self.decode(world.batch_size)
            ),
            f"the same, branch=both, {world.batch_size}": self.read(2 * world.batch_size, steer=True),
            f"validation of {world.val_batch_size}": self.read(world.val_batch_size),
            f"training of {self.cfg.batch_size}": self.read(self.cfg.batch_size, learn=True)
            + 12 * count_parameters(self.head),
        }


@command("memory")
def main(cfg: DictConfig) -> None:
    """Prints a line for each job."""
    if cfg.world.name not in TEXT_PARAMETERS or cfg.world.name == "marionette":
        raise ValueError(f"world: expected a published one, whose size is known, got {cfg.world.name}")
    jobs = Jobs(cfg)
    print(f"{jobs.weights / 2**30:5.2f} GB  weights")
    for job, peak in jobs.peaks().items():
        print(f"{(jobs.weights + peak) / 2**30:5.2f} GB  with {job}")


if __name__ == "__main__":
    main()
