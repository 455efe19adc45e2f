"""What a computation takes, counted instead of timed: operations, passes through a U-Net, memory kept for backward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from experiments.benchmark.architectures import TEXT_PARAMETERS, TOKENS, count_parameters, make_autoencoder, make_unet
from rg.backbone.conditions import Condition
from rg.backbone.denoiser import condition_dim, tap_channels, time_embed_dim
from rg.backbone.features import predict
from rg.heads.base import ReadoutHead

ATEN = torch.ops.aten


class _NoModules(nullcontext):
    """Instead of torch's tracker of modules, whose hooks break autograd.grad at a leaf."""

    parents = ("Global",)


def flop_counter() -> FlopCounterMode:
    """Counts the floating-point operations of matrix products, convolutions and attention, two per multiply-add."""
    # torch's own table lacks the attention of CPUs.
    attention = {
        ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
            sdpa_backward_flop_count(gradient, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    counter.mod_tracker = _NoModules()
    return counter


@dataclass
class Passes:
    """Rows that went through a U-Net, again where it is recomputed as a whole, and rows whose gradient came back."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def counted_passes(unet: Any) -> Iterator[Passes]:
    """Counts the U-Net's passes inside the context, at its first convolution."""
    passes = Passes()

    def gone_back(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def passed(_module: nn.Module, _given: Any, output: Tensor) -> None:
        passes.forwards += len(output)
        if output.requires_grad:
            output.register_hook(gone_back)

    handle = unet.conv_in.register_forward_hook(passed)
    try:
        yield passes
    finally:
        handle.remove()


@dataclass
class Kept:
    """Storages that autograd keeps for a backward pass, by identity, with their bytes."""

    storages: dict[int, int]

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def kept_for_backward(weights: Iterable[Tensor]) -> Iterator[Kept]:
    """Collects what autograd saves inside the context, each storage once; `weights` are in memory anyway."""
    owned, kept = {weight.untyped_storage()._cdata for weight in weights}, Kept({})

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept.storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


@dataclass(frozen=True)
class Pass:
    """One row through a network: FLOP of its forward and of its backward to the input, bytes kept in between."""

    parameters: int
    forward: int
    backward: int
    kept: int


def count_pass(module: nn.Module, run: Callable[[], list[Tensor]], inputs: Sequence[Tensor]) -> Pass:
    """Counts `run()`, which gives tensors, and the gradient of their sum at inputs; the weights are held fixed."""
    with flop_counter() as forward, kept_for_backward([*module.parameters(), *inputs]) as kept:
        outputs = run()
    nbytes = kept.nbytes
    with flop_counter() as backward:
        torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
    return Pass(count_parameters(module), forward.get_total_flops(), backward.get_total_flops(), nbytes)


@dataclass(frozen=True)
class Counted:
    """A world's parts: one row of U-Net and head, one image of the autoencoder (FLOP).

    train: FLOP of the head's backward pass to its weights. features: (C, h, w) of every tap. latent: (C, h, w).
    image: its side in pixels. itemsize: bytes of a number in U-Net and text encoders; the rest is float32.
    """

    unet: Pass
    head: Pass
    train: int
    encode: int
    decode: int
    autoencoder_parameters: int
    text_parameters: int
    features: list[tuple[int, ...]]
    latent: tuple[int, int, int]
    image: int
    itemsize: int


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes new weights of a dtype: those of fake modules cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def count(model: str, dtype: torch.dtype, make_head: Callable[..., ReadoutHead]) -> Counted:
    """Counts a world's parts at its own size, without loading or making a weight.

    Args:
        make_head: called with tap_channels and time_embed_dim.
    """
    # Fake tensors and not plain meta ones: for those torch takes another attention, which keeps all its weights.
    with FakeTensorMode():
        with default_dtype(dtype):
            unet = make_unet(model).eval().requires_grad_(False)
        side, channels = unet.config.sample_size, unet.config.in_channels
        vae = make_autoencoder(model)
        image = side * 2 ** (len(vae.config.block_out_channels) - 1)
        x = torch.randn(1, channels, side, side, dtype=dtype, requires_grad=True)
        pooled = torch.randn(1, 1280) if unet.config.addition_embed_type else None
        inputs = Condition(torch.randn(1, TOKENS, condition_dim(unet)), pooled).inputs(1, (image, image), x)
        features: list[Tensor] = []

        def run() -> list[Tensor]:
            features.extend(predict(unet, x, torch.tensor([500]), **inputs).features)
            return features

        unet_pass = count_pass(unet, run, [x])
        with torch.no_grad(), flop_counter() as encode:
            vae.encode(torch.randn(1, 3, image, image))
        with torch.no_grad(), flop_counter() as decode:
            vae.decode(torch.randn(1, channels, side, side))
    shapes = [tuple(feature.shape[1:]) for feature in features]
    with torch.device("meta"):
        head = make_head(tap_channels=tap_channels(unet), time_embed_dim=time_embed_dim(unet))
        head_pass, train = count_head(head, shapes)
    return Counted(
        unet=unet_pass,
        head=head_pass,
        train=train,
        encode=encode.get_total_flops(),
        decode=decode.get_total_flops(),
        autoencoder_parameters=count_parameters(vae),
        text_parameters=TEXT_PARAMETERS[model],
        features=shapes,
        latent=(channels, side, side),
        image=image,
        itemsize=dtype.itemsize,
    )


def count_head(head: ReadoutHead, shapes: list[tuple[int, ...]]) -> tuple[Pass, int]:
    """A row of taps of these shapes through a head, and the FLOP of its backward pass to the weights."""
    features = [torch.zeros(1, *shape, requires_grad=True) for shape in shapes]
    embedding = torch.zeros(1, head.hparams.time_embed_dim)
    with flop_counter() as training:
        head([feature.detach() for feature in features], embedding).sum().backward()
    head.requires_grad_(False)
    head_pass = count_pass(head, lambda: [head(features, embedding)], features)
    return head_pass, training.get_total_flops() - head_pass.forward
