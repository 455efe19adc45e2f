"""The contract between heads and guidance. It imports neither Lightning nor a head."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from rg.backbone.denoiser import embed_time
from rg.points import Size


@runtime_checkable
class EnergyHead(Protocol):
    """What guidance asks of a head. A class of one's own may extend it: then it has to give `__call__` and `energy`.

    prompt: the condition under which its features are read; None: whatever the pipeline holds.
    readout_span: width of the readout's range of values; None where the latent range factor does not apply.
    """

    prompt: str | None = None
    readout_span: float | None = 1.0

    def __call__(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """Readout of taps (B, C_l, h_l, w_l), coarse to fine, and time embedding (B, E)."""
        ...

    def time_index(self, timesteps: Tensor, num_timesteps: int) -> Tensor | None:
        """The index whose embedding belongs to timesteps (B,) of num_timesteps; None: the head takes none."""
        return timesteps

    def energy(self, readout: Tensor, target: Tensor, **arguments: Any) -> Tensor:
        """What guidance lowers, per sample: (B,)."""
        ...

    def encode_target(self, control: Tensor, *, readout_size: Size, image_size: Size) -> Tensor:
        """A control on the readout's grid; both sizes are (height, width)."""
        return control

    def check_denoiser(self, denoiser: nn.Module) -> None:
        """Raises ValueError when the head was made for another denoiser."""


class FunctionHead(EnergyHead):
    """A plain function of features as a head: what it returns is itself the energy (B,)."""

    def __init__(self, function: Callable[[list[Tensor], Tensor | None], Tensor], prompt: str | None = None) -> None:
        self.function, self.prompt = function, prompt

    def __call__(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        return self.function(features, time_embedding)

    def energy(self, readout: Tensor, target: Tensor, **arguments: Any) -> Tensor:
        return readout


def time_embedding(head: EnergyHead, denoiser: nn.Module, timesteps: Tensor, num_timesteps: int) -> Tensor | None:
    """The denoiser's embedding (B, E) of the index that a head takes at timesteps (B,), in float32, or None.

    The one owner of this step, for training, sampling and evaluation.
    """
    index = head.time_index(timesteps, num_timesteps)
    return None if index is None else embed_time(denoiser, index).float()
