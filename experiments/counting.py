"""What a computation takes, counted instead of timed: operations, passes through a U-Net, memory kept for backward."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from experiments.architectures import count_parameters

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
