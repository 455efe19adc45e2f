"""Depth of any image by the networks that transformers holds: MiDaS's DPT and Depth Anything."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForDepthEstimation

from data_prep.annotators.networks import in_batches, place
from data_prep.records import Label, Skip, SourceSample


class Depth:
    """Relative inverse depth as grey, scaled to each image's smallest and largest: white is nearest, black farthest.

    An image of one depth alone is skipped by name.

    Args:
        model: "owner/name" on the hub, or a folder of the same layout.
        revision: the commit on the hub; None takes the newest.
        side: of the square that the network sees, in pixels.
        mean, std: of the images that the network was trained on, per channel, levels in [0, 1].
        batch_size: images at once on a GPU.

    Raises:
        FileNotFoundError: there is no such folder, or the hub does not answer.
        ValueError: it holds another kind of network, or lacks some of its weights.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        side: int = 384,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        batch_size: int = 8,
    ) -> None:
        self.network = place(load_depth(model, revision))
        self.like = next(self.network.parameters())
        self.mean, self.std = (torch.tensor(list(v)).view(1, 3, 1, 1).to(self.like) for v in (mean, std))
        self.side, self.batch_size = side, batch_size

    def annotate(self, samples: Sequence[SourceSample]) -> list[Label | Skip]:
        images = torch.stack([sample.image for sample in samples])
        depths = in_batches(self._read, images, self.like, self.batch_size)
        return [self._label(sample, depth) for sample, depth in zip(samples, depths, strict=True)]

    def _read(self, images: Tensor) -> Tensor:
        """Inverse depth (B, H, W) of levels (B, 3, H, W), of any scale."""
        small = functional.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        depths = self.network(((small / 255).clamp(0, 1) - self.mean) / self.std).predicted_depth
        return functional.interpolate(depths[:, None].float(), images.shape[-2:], mode="bicubic")[:, 0]

    def _label(self, sample: SourceSample, depth: Tensor) -> Label | Skip:
        least, most = depth.aminmax()
        if not most - least > 1e-6 * most.abs():
            return Skip(f"{sample.name} has no label: everything in it has one depth, {float(most):g}")
        grey = ((depth - least) / (most - least) * 255).round().byte()
        return Label(grey.expand(3, -1, -1), torch.zeros(0, 18, 3))


def load_depth(model: str, revision: str | None) -> torch.nn.Module:
    """The network of a folder or a repository; see `Depth`."""
    try:
        kind = AutoConfig.from_pretrained(model, revision=revision)
        network, report = AutoModelForDepthEstimation.from_pretrained(
            model, revision=revision, config=kind, output_loading_info=True
        )
    except OSError as error:
        said = " ".join(str(error).split())
        raise FileNotFoundError(f"pictures.depth.model={model}: expected a network of depth, found {said}") from error
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"pictures.depth.model={model}: expected a network of depth, found {said}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ValueError(
            f"pictures.depth.model={model}: expected the weights of a {type(network).__name__}, "
            f"found none for {len(lacking)} of them, such as {lacking[0]}"
        )
    return network
