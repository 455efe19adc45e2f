"""A world's models, counted without their weights: the part of experiments.cost that knows torch's fake tensors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from experiments.architectures import TEXT_PARAMETERS, TOKENS, count_parameters, make_autoencoder, make_unet
from experiments.counting import Pass, count_pass, flop_counter
from rg.conditions import Condition
from rg.denoisers import condition_dim, tap_channels, time_embed_dim
from rg.hooks import predict
from rg.readout import ReadoutHead


@dataclass(frozen=True)
class Counted:
    """A world's parts: one row of U-Net and head, one picture of the autoencoder (FLOP).

    train: FLOP of the head's backward pass to its weights. features: (C, h, w) of every tap. latent: (C, h, w).
    picture: its side in pixels. itemsize: bytes of a number in U-Net and text encoders; the rest is float32.
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
    picture: int
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
        picture = side * 2 ** (len(vae.config.block_out_channels) - 1)
        x = torch.randn(1, channels, side, side, dtype=dtype, requires_grad=True)
        pooled = torch.randn(1, 1280) if unet.config.addition_embed_type else None
        inputs = Condition(torch.randn(1, TOKENS, condition_dim(unet)), pooled).inputs(1, (picture, picture), x)
        features: list[Tensor] = []

        def run() -> list[Tensor]:
            features.extend(predict(unet, x, torch.tensor([500]), **inputs).features)
            return features

        unet_pass = count_pass(unet, run, [x])
        with torch.no_grad(), flop_counter() as encode:
            vae.encode(torch.randn(1, 3, picture, picture))
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
        picture=picture,
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
