"""What annotators that are networks share: where weights come from, how they are checked, and batches of one size."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn

from rg.io.files import require_file

Network = TypeVar("Network", bound=nn.Module)
MAX_BYTES = 2**31


def find_file(key: str, path: str | None, *, repo: str, file: str, revision: str, instead: str = "") -> Path:
    """A file of one's own, or one of the hub, which is downloaded once.

    Args:
        key: the setting that names a file of one's own, for messages.
        path: that file; None takes the hub's.
        repo, file, revision: "owner/name" on the hub, the file's name there, and the commit.
        instead: what else may be done, for messages.

    Raises:
        FileNotFoundError: there is no such file, or the hub does not answer.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{key}={path}: expected a file of weights, found none")
        return Path(path)
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:  # no network, no such revision, a proxy's answer: every kind has a class of its own
        found = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{repo}/{file}: expected an answer of the hub, found {found}: give {key}=FILE{instead}"
        ) from error


def load_weights(cls: type[Network], path: Path, tensors: Mapping[str, Any] | None = None) -> Network:
    """A network with the state dict of a file of torch, in float32; names and shapes are checked.

    Args:
        cls: the network's class, which takes no arguments.
        path: the file, of which tensors alone are read.
        tensors: the state dict, where the file is of another kind and has been read.

    Raises:
        ValueError: no such file, or the weights of another network: the first tensor that differs is named.
    """
    if tensors is None:
        require_file(path, MAX_BYTES)
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file may fail anywhere inside its reader
            raise ValueError(f"{path}: expected weights of torch, found a file that cannot be read: {error}") from error
    with torch.device("meta"):  # what is loaded is not drawn at random first
        network = cls()
    expected = network.state_dict()
    entries = tensors.items() if isinstance(tensors, Mapping) else ()
    found = {key: value for key, value in entries if isinstance(value, Tensor)}
    for key in [*expected, *found]:
        wanted, got = (tuple(side[key].shape) if key in side else None for side in (expected, found))
        if wanted != got:
            needed = f"{_said(wanted)} of a {cls.__name__}"
            raise ValueError(f"{path}: {key}: expected {needed}, found {_said(got)}: another network?")
    network.load_state_dict({key: tensor.float() for key, tensor in found.items()}, assign=True)
    return network


def _said(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else f"a tensor {shape}"


def place(network: nn.Module) -> nn.Module:
    """The network, frozen, in half precision on a GPU where there is one."""
    network = network.eval().requires_grad_(False)
    return network.half().cuda() if torch.cuda.is_available() else network


@torch.no_grad()
def in_batches(network: Callable[[Tensor], Tensor], images: Tensor, like: Tensor, batch_size: int) -> Tensor:
    """What a network makes of images (N, 3, H, W), uint8: (N, ...) float32 on the CPU.

    A batch has always the same size, one image on a CPU: the last bits of an output depend on it.

    Args:
        network: takes levels 0..255 on the device and of the dtype of `like`.
        images: on the CPU.
        like: any of the network's weights.
        batch_size: images at once on a GPU.
    """
    size = batch_size if like.is_cuda else 1
    padded = torch.cat([images, images.new_zeros(-len(images) % size, *images.shape[1:])])
    outputs = [network(batch.to(like)).float().cpu() for batch in padded.split(size)]
    return torch.cat(outputs)[: len(images)]
