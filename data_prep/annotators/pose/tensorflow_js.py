"""Runs graph models of TensorFlow.js in torch: a folder's NAME.json and NAME.bin, with what MoveNet needs of it.

Tensors keep TensorFlow's order, (batch, height, width, channels). Only plain data is read, no code.
"""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rg.io.files import read_json, require_file

MAX_BYTES = 2**29
DTYPES = {"DT_FLOAT": torch.float32, "DT_INT32": torch.int32, "DT_BOOL": torch.bool}
STORED = {"float16": np.float16, "float32": np.float32, "int32": np.int32, "bool": np.bool_, "uint8": np.uint8}
Operation = Callable[[dict[str, Any], list[Tensor]], Any]


class GraphModel:
    """A graph with its weights; called with a tensor for each placeholder it gives the first output.

    Args:
        path: NAME.json, of the format "graph-model".

    Raises:
        ValueError: a file is missing or damaged, or the graph has an operation that is not known here.
    """

    def __init__(self, path: Path) -> None:
        model = read_json(path)
        try:
            nodes = model["modelTopology"]["node"]
            self.nodes = {node["name"]: node for node in nodes}
            self.output = next(iter(model["signature"]["outputs"].values()))["name"]
            groups = [
                (path.parent / name, group["weights"]) for group in model["weightsManifest"] for name in group["paths"]
            ]
            self.weights = {
                name: tensor for file, entries in groups for name, tensor in read_weights(file, entries).items()
            }
        except (KeyError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(f"{path}: expected a graph model of TensorFlow.js, found none: {error!r}") from error
        unknown = sorted({node["op"] for node in nodes} - {"Const", "Placeholder", *OPERATIONS})
        if unknown:
            raise ValueError(f"{path}: expected operations that are known here, found {', '.join(unknown)}")

    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> Tensor:
        values: dict[str, tuple[Tensor, ...]] = {name: (tensor,) for name, tensor in (self.weights | inputs).items()}
        waiting = [_source(self.output)[0]]
        while waiting:
            node = self.nodes[waiting[-1]]
            sources = [_source(name) for name in node.get("input", ()) if not name.startswith("^")]
            missing = [name for name, _ in sources if name not in values]
            if missing:
                waiting += missing
                continue
            name = waiting.pop()
            if name not in values:
                given = [values[source][part] for source, part in sources]
                made = OPERATIONS[node["op"]](node.get("attr") or {}, given)
                values[name] = made if isinstance(made, tuple) else (made,)
        source, part = _source(self.output)
        return values[source][part]


def read_weights(path: Path, entries: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors that the entries of a manifest describe, one after the other in a file."""
    require_file(path, MAX_BYTES)
    data, place, tensors = path.read_bytes(), 0, {}
    for entry in entries:
        stored = np.dtype(STORED[entry.get("quantization", entry)["dtype"]])
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if place + count * stored.itemsize > len(data):
            raise ValueError(f"{path}: expected {entry['name']} at byte {place}, found {len(data)} bytes in all")
        values = np.frombuffer(data, stored, count, place).astype(STORED[entry["dtype"]])
        tensors[entry["name"]] = torch.from_numpy(values.reshape(entry["shape"]))
        place += count * stored.itemsize
    return tensors


def _source(name: str) -> tuple[str, int]:
    name, _, part = name.partition(":")
    return name, int(part or 0)


def _numbers(attributes: dict[str, Any], key: str) -> list[int]:
    return [int(number) for number in attributes[key]["list"]["i"]]


def _word(attributes: dict[str, Any], key: str) -> str:
    return base64.b64decode(attributes[key]["s"]).decode()


def _flag(attributes: dict[str, Any], key: str) -> bool:
    return bool(attributes.get(key, {}).get("b", False))


def _integer(attributes: dict[str, Any], key: str) -> int:
    return int(attributes.get(key, {}).get("i", 0))


def _same(x: Tensor, window: tuple[int, int], attributes: dict[str, Any], fill: float = 0.0) -> Tensor:
    """(B, C, H, W) padded as TensorFlow's SAME does: what is odd goes to the right and below."""
    if _word(attributes, "padding") == "VALID":
        return x
    sides = []
    for size, side, stride in zip(x.shape[-2:], window, _numbers(attributes, "strides")[1:3], strict=True):
        total = max((-(-size // stride) - 1) * stride + side - size, 0)
        sides.append((total // 2, total - total // 2))
    return functional.pad(x, (*sides[1], *sides[0]), value=fill)


def _convolve(attributes: dict[str, Any], given: list[Tensor], depthwise: bool = False) -> Tensor:
    x, weight = given[0].permute(0, 3, 1, 2), given[1]
    x = _same(x, tuple(weight.shape[:2]), attributes)
    groups = x.shape[1] if depthwise else 1
    order = weight.permute(2, 3, 0, 1).flatten(0, 1)[:, None] if depthwise else weight.permute(3, 2, 0, 1)
    bias = given[2] if len(given) > 2 else None
    made = functional.conv2d(x, order, bias, stride=_numbers(attributes, "strides")[1:3], groups=groups)
    for fused in attributes.get("fused_ops", {}).get("list", {}).get("s", ()):
        name = base64.b64decode(fused).decode()
        if name != "BiasAdd":
            made = {"Relu": torch.relu, "Relu6": functional.relu6}[name](made)
    return made.permute(0, 2, 3, 1)


def _max_pool(attributes: dict[str, Any], given: list[Tensor]) -> Tensor:
    window = tuple(_numbers(attributes, "ksize")[1:3])
    x = _same(given[0].permute(0, 3, 1, 2), window, attributes, -torch.inf)
    return functional.max_pool2d(x, window, _numbers(attributes, "strides")[1:3]).permute(0, 2, 3, 1)


def _resize(attributes: dict[str, Any], given: list[Tensor]) -> Tensor:
    if not _flag(attributes, "half_pixel_centers") or _flag(attributes, "align_corners"):
        raise ValueError("ResizeBilinear: expected half_pixel_centers and no align_corners, found others")
    size = [int(side) for side in given[1]]
    return functional.interpolate(given[0].permute(0, 3, 1, 2), size, mode="bilinear").permute(0, 2, 3, 1)


def _slice(attributes: dict[str, Any], given: list[Tensor]) -> Tensor:
    x, starts, stops, steps = given[0], *(tensor.tolist() for tensor in given[1:])
    masks = ("begin", "end", "shrink_axis", "new_axis", "ellipsis")
    begin, end, drop, new, rest = (_integer(attributes, f"{name}_mask") for name in masks)
    if any(step < 1 for step in steps):
        raise ValueError(f"StridedSlice: expected positive steps, found {steps}")
    places: list[Any] = []
    for axis, (start, stop, step) in enumerate(zip(starts, stops, steps, strict=True)):
        chosen = slice(None if begin >> axis & 1 else start, None if end >> axis & 1 else stop, step)
        choices = ((rest, ...), (new, None), (drop, start), (-1, chosen))
        places.append(next(place for mask, place in choices if mask >> axis & 1))
    return x[tuple(places)]


def _gather(_attributes: dict[str, Any], given: list[Tensor]) -> Tensor:
    x, places = given
    return x[tuple(places.long().unbind(-1))]


def _reduce(function: Callable[..., Tensor]) -> Operation:
    def run(attributes: dict[str, Any], given: list[Tensor]) -> Tensor:
        return function(given[0], dim=given[1].reshape(-1).tolist(), keepdim=_flag(attributes, "keep_dims"))

    return run


def _top(attributes: dict[str, Any], given: list[Tensor]) -> tuple[Tensor, Tensor]:
    values, places = given[0].topk(int(given[1]))
    return values, places.int()


def _plain(function: Callable[..., Any]) -> Operation:
    return lambda attributes, given: function(*given)


def _squeeze(attributes: dict[str, Any], given: list[Tensor]) -> Tensor:
    return given[0].squeeze(_numbers(attributes, "squeeze_dims"))


def _sizes(tensor: Tensor) -> list[int]:
    return [int(size) for size in tensor]


OPERATIONS: dict[str, Operation] = {
    **{
        name: _plain(function)
        for name, function in {
            "Mul": torch.mul, "AddV2": torch.add, "Sub": torch.sub, "RealDiv": torch.div, "Sigmoid": torch.sigmoid,
            "Exp": torch.exp, "Abs": torch.abs, "Reciprocal": torch.reciprocal, "Maximum": torch.maximum,
            "Minimum": torch.minimum, "Less": torch.lt, "Greater": torch.gt, "GreaterEqual": torch.ge,
            "Equal": torch.eq, "LogicalAnd": torch.logical_and, "Select": torch.where, "Identity": lambda x: x,
            "FloorDiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
            "SquaredDifference": lambda a, b: (a - b) ** 2,
            "AddN": lambda *terms: sum(terms[1:], terms[0]),
            "Shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
            "Size": lambda x: torch.tensor(x.numel(), dtype=torch.int32),
            "Reshape": lambda x, shape: x.reshape(_sizes(shape)),
            "Tile": lambda x, counts: x.repeat(_sizes(counts)),
            "Fill": lambda shape, value: value.expand(_sizes(shape)),
            "ExpandDims": lambda x, axis: x.unsqueeze(int(axis)),
            "Range": lambda start, stop, step: torch.arange(
                start.item(), stop.item(), step.item(), dtype=start.dtype
            ),
            "ArgMax": lambda x, axis: x.argmax(int(axis)).int(),
            "ConcatV2": lambda *parts: torch.cat(parts[:-1], int(parts[-1])),
        }.items()
    },
    "Cast": lambda attributes, given: given[0].to(DTYPES[attributes["DstT"]["type"]]),
    "Pack": lambda attributes, given: torch.stack(given, _integer(attributes, "axis")),
    "Unpack": lambda attributes, given: given[0].unbind(_integer(attributes, "axis")),
    "Split": lambda attributes, given: given[1].chunk(_integer(attributes, "num_split"), int(given[0])),
    "Max": _reduce(torch.amax),
    "Sum": _reduce(torch.sum),
    "_FusedConv2D": _convolve,
    "FusedDepthwiseConv2dNative": lambda attributes, given: _convolve(attributes, given, depthwise=True),
    "DepthwiseConv2dNative": lambda attributes, given: _convolve(attributes, given, depthwise=True),
    "MaxPool": _max_pool,
    "ResizeBilinear": _resize,
    "StridedSlice": _slice,
    "GatherNd": _gather,
    "TopKV2": _top,
    "Squeeze": _squeeze,
}  # fmt: skip
