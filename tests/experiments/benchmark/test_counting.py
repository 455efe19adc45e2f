import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.benchmark.counting import count_pass, counted_passes, flop_counter, kept_for_backward


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_in_closed_form(device):
    # A 3x3 convolution of C to D channels on h x w cells: 2 * 9 * C * D * h * w; its gradient to the input is as much.
    layer = nn.Conv2d(6, 10, 3, padding=1, device=device).requires_grad_(False)
    x = torch.randn(2, 6, 8, 4, device=device, requires_grad=True)
    counted = count_pass(layer, lambda: [layer(x)], [x])
    flop = 2 * 9 * 6 * 10 * 8 * 4 * 2
    assert (counted.forward, counted.backward, counted.parameters) == (flop, flop, 6 * 10 * 9 + 10)
    assert counted.kept == 0, "of a layer that is linear in its input nothing but weights is kept"


def test_attention_of_cpus_is_counted():
    # Two products of n x n with d: 4 n^2 d per head; backward has four and the first one again.
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    with flop_counter() as forward:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert forward.get_total_flops() == 4 * 16**2 * 8 * 2 * 3
    with flop_counter() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 10 * 16**2 * 8 * 2 * 3


def test_kept_storages_count_once_and_weights_do_not():
    layer = nn.Linear(4, 4)
    x = torch.randn(5, 4, requires_grad=True)
    with kept_for_backward(layer.parameters()) as kept:
        hidden = layer(x)
        hidden.sigmoid() + hidden.sin()
    assert kept.nbytes == 4 * 5 * 4 * 3  # x, the sigmoid, and hidden for the sine


def test_passes_count_recomputation(tiny_pipeline):
    unet = tiny_pipeline().unet.requires_grad_(False)
    x, condition = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 5, 8)

    def run(x):
        return unet(x, 5, condition).sample

    with counted_passes(unet) as passes:
        run(x.detach())
        assert (passes.forwards, passes.backwards) == (3, 0)
        run(x).sum().backward()
        assert (passes.forwards, passes.backwards) == (6, 3)
        checkpoint(run, x, use_reentrant=True).sum().backward()
        assert (passes.forwards, passes.backwards) == (12, 6)
    run(x.detach())
    assert passes.forwards == 12
