import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rg.io.weights import load_network


class Tiny(nn.Module):
    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.offset = torch.ones(width)  # no part of the weights


class Counting(Tiny):
    """Computes with its tensors while it is made."""

    def __init__(self, *, width: int) -> None:
        super().__init__(width=width)
        self.total = float(self.offset.sum())


def weights(path: Path, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    torch.manual_seed(0)
    tensors = {name: value.to(dtype) for name, value in Tiny(width=3).state_dict().items()}
    tensors = {name: changed.get(name.replace(".", "_"), value) for name, value in tensors.items()}
    extra = {name: value for name, value in changed.items() if name not in {key.replace(".", "_") for key in tensors}}
    save_file({name: value for name, value in (tensors | extra).items() if value is not None}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [Tiny, Counting])
def test_weights_of_any_precision_are_read_in_float32(tmp_path, dtype, cls):
    path = weights(tmp_path / "w.safetensors", dtype, steps=torch.tensor(2.0e6, dtype=torch.float32))
    network = load_network(cls, {"width": 3}, path, "config.json")
    torch.manual_seed(0)
    torch.testing.assert_close(network.layer.weight, Tiny(width=3).layer.weight, rtol=1e-2, atol=0)
    assert network.layer.weight.dtype == torch.float32 and not network.training
    assert network.steps == 2_000_000 and network.offset.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_bias": torch.tensor([0.0, torch.nan])}, r"layer.bias: .*1e\+06, found nan"),
        ({"layer_bias": torch.tensor([0.0, -torch.inf])}, r"layer.bias: .*1e\+06, found inf"),
        ({"layer_bias": torch.tensor([0.0, 1e30])}, r"layer.bias: .*found 1e\+30"),
        ({"layer_bias": torch.tensor([0, 1])}, r"layer.bias: .*F32.* I64"),
        ({"layer_bias": torch.zeros(3)}, r"layer.bias: .*\(2,\).* \(3,\)"),
        ({"layer_bias": None}, "layer.bias: expected this tensor, found none"),
        ({"more": torch.zeros(1)}, "more: expected no tensor of this name, found one"),
    ],
)
def test_weights_that_cannot_be_used_are_named(tmp_path, change, words):
    path = weights(tmp_path / "w.safetensors", **change)
    with pytest.raises(ValueError, match=f"{path}: {words}"):
        load_network(Tiny, {"width": 3}, path, "config.json")


def test_files_that_are_no_weights_are_named(tmp_path):
    path = weights(tmp_path / "w.safetensors")
    for data in (b"", path.read_bytes()[:40], b"\xff" * 100):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{path}: expected safetensors, found "):
            load_network(Tiny, {"width": 3}, path, "config.json")


@pytest.mark.parametrize("width", [4, 10**11])
def test_arguments_of_another_size_are_found_before_memory_is_taken(tmp_path, width):
    path = weights(tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=rf"{path}: layer.weight: expected .*\(2, {width}\).* found \(2, 3\)"):
        load_network(Tiny, {"width": width}, path, "config.json")
    with pytest.raises(ValueError, match="config.json: expected arguments of a Tiny, found RuntimeError"):
        load_network(Tiny, {"width": -1}, path, "config.json")


def test_what_is_no_regular_file_of_weights_is_not_waited_for(tmp_path):
    path = tmp_path / "w.safetensors"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: .*regular file"):
        load_network(Tiny, {"width": 3}, path, "config.json")
    path.unlink()
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=f"{path}: .*bytes"):
        load_network(Tiny, {"width": 3}, path, "config.json")
