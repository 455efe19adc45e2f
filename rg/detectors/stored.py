"""How the small networks that judge images are stored: a folder of weights and of the constructor's arguments."""

import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import nn

from rg.io.files import atomic, read_json
from rg.io.records import validate
from rg.io.weights import load_network
from rg.models import locate

WEIGHTS, CONFIG = "model.safetensors", "config.json"


class StoredNetwork(nn.Module):
    """A network that keeps the arguments of its constructor in `config`, plain values."""

    config: dict[str, Any]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes weights (half precision) and configuration, both whole or not at all."""
        target = Path(folder)
        with atomic(target / CONFIG) as config, atomic(target / WEIGHTS) as weights:
            weights.write_bytes(save({name: value.half().contiguous() for name, value in self.state_dict().items()}))
            config.write_text(json.dumps(self.config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Reads what `save_pretrained` wrote, or a shipped network by its name, in float32, ready to judge.

        Raises:
            FileNotFoundError: the folder or a file is missing; the message names it.
            ValueError: a file is damaged or does not fit the other, see rg.io.weights.load_network.
        """
        folder = locate(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"expected a folder with {CONFIG} and {WEIGHTS}, found no {name} in {folder}")
        name = str(folder / CONFIG)
        config = validate(dict[str, Any], read_json(folder / CONFIG), name)
        return load_network(cls, config, folder / WEIGHTS, name).to(device)
