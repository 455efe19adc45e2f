"""Networks from a record of their arguments and a file of their weights, both checked before use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rg.io.files import require_file
from rg.io.records import check_arguments

Network = TypeVar("Network", bound=nn.Module)
MAX_BYTES = 2**36
DTYPES = ("F16", "BF16", "F32", "F64")
# Trained weights are far below; one above is damaged.
LARGEST = 1e6


def load_network(cls: type[Network], arguments: dict[str, Any], weights: Path, name: str) -> Network:
    """A network in float32 and evaluation mode; its arguments, the names, shapes and values of its weights are checked.

    Args:
        cls: the network's class.
        arguments: of its constructor.
        weights: a safetensors file.
        name: what errors call the record of the arguments.

    Raises:
        ValueError: arguments that the class does not take, or see `read_weights`.
    """
    check_arguments(cls, arguments, name)
    try:
        try:
            with torch.device("meta"):  # shapes without memory, which a damaged record could ask for without end
                expected = cls(**arguments).state_dict()
        except (NotImplementedError, RuntimeError):  # a class that computes with its tensors while it is made
            expected = cls(**arguments).state_dict()
    except Exception as error:  # whatever a constructor raises for values it cannot work with
        raise ValueError(f"{name}: expected arguments of a {cls.__name__}, found {error!r}") from error
    tensors = read_weights(weights, expected)
    network = cls(**arguments)
    network.load_state_dict(tensors)
    return network.eval()


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file, in float32.

    Args:
        path: the file.
        expected: tensors of the same names and shapes, on any device.

    Raises:
        ValueError: the file is damaged, lacks a tensor or has one too many, or one has another shape, is not of
            floating point, or holds a value that is not finite or larger than LARGEST.
    """
    require_file(path, MAX_BYTES)
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  no mapping
            _check_shapes(path, found, expected)
            tensors = {key: file.get_tensor(key).float() for key in found}
    except (SafetensorError, OSError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path}: expected safetensors, found a file that cannot be read: {error}") from error
    for key, tensor in tensors.items():
        # Counters are stored as floats, and may be large.
        limit = LARGEST if expected[key].is_floating_point() else torch.finfo(tensor.dtype).max
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not largest <= limit:
            raise ValueError(f"{path}: {key}: expected values of at most {limit:g}, found {largest:g}")
    return tensors


def _check_shapes(path: Path, found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    for key in [*expected, *found]:
        if key not in found or key not in expected:
            here, other = ("none", "this tensor") if key not in found else ("one", "no tensor of this name")
            raise ValueError(f"{path}: {key}: expected {other}, found {here}")
        shape, dtype = tuple(found[key].get_shape()), found[key].get_dtype()
        if shape != tuple(expected[key].shape) or dtype not in DTYPES:
            wanted = f"{tuple(expected[key].shape)} in one of {', '.join(DTYPES)}"
            raise ValueError(f"{path}: {key}: expected a tensor {wanted}, found {shape} in {dtype}")
