"""The network of every head: taps of all sizes, mixed into one map (Luo et al., 2023 and 2024)."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rg.points import Size


class Bottleneck(nn.Module):
    """One tap's residual block (Diffusion Hyperfeatures, Luo et al., 2023): 1x1, 3x3, 1x1 with GroupNorm."""

    def __init__(self, channels: int, projection_dim: int, norm_groups: int, time_embed_dim: int) -> None:
        super().__init__()
        width = projection_dim // 4
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.GroupNorm(norm_groups, width)
        self.time = nn.Linear(time_embed_dim, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups, width)
        self.conv3 = nn.Conv2d(width, projection_dim, 1, bias=False)
        self.norm3 = nn.GroupNorm(norm_groups, projection_dim)
        self.shortcut: nn.Conv2d | None = None
        if channels != projection_dim:
            self.shortcut = nn.Conv2d(channels, projection_dim, 1, bias=False)
            self.shortcut_norm = nn.GroupNorm(norm_groups, projection_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, feature: Tensor, time_embedding: Tensor | None, size: Size, weight: Tensor) -> Tensor:
        """The block's output times a weight (), not negative."""
        feature = feature.contiguous(memory_format=torch.channels_last)  # of the weights; mixed formats are slow
        # A bias-free 1x1 convolution commutes with bilinear resizing: it runs on the smaller map.
        hidden = F.relu(self.norm1(_resize(self.conv1(feature), size)))
        if time_embedding is not None:
            hidden = hidden + F.relu(self.time(time_embedding))[:, :, None, None]
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        # w relu(a + b) = relu(w a + w b): w is folded into the norms' affine parameters at no cost.
        hidden = _weighted(self.norm3, self.conv3(hidden), weight)
        if self.shortcut is None:
            return F.relu_(hidden.add_(weight * _resize(feature, size)))
        return F.relu_(hidden.add_(_weighted(self.shortcut_norm, _resize(self.shortcut(feature), size), weight)))


def _weighted(norm: nn.GroupNorm, maps: Tensor, weight: Tensor) -> Tensor:
    """weight * norm(maps)."""
    return F.group_norm(maps, norm.num_groups, weight * norm.weight, weight * norm.bias, norm.eps)


def _resize(maps: Tensor, size: Size) -> Tensor:
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


class AggregationNetwork(nn.Module):
    """Mixes taps into one map: sum_l softmax(mixing_weights)_l * Bottleneck_l(feature_l).

    Args:
        tap_channels: channels of all taps, coarse to fine.
        taps: numbers of those that are mixed, the others are not read; None: all.
        time_embed_dim, projection_dim, norm_groups, output_scale: see rg.heads.base.ReadoutHead.

    Raises:
        ValueError: `taps` are none, not different, or not taps.
    """

    def __init__(
        self,
        *,
        tap_channels: list[int],
        time_embed_dim: int,
        projection_dim: int,
        norm_groups: int,
        output_scale: int,
        taps: list[int] | None = None,
    ) -> None:
        super().__init__()
        known = range(len(tap_channels))
        self.taps = list(known if taps is None else taps)
        if not self.taps or len(set(self.taps)) < len(self.taps) or not set(self.taps) <= set(known):
            raise ValueError(f"taps: expected different numbers of 0 to {len(tap_channels) - 1}, got {taps}")
        self.output_scale, self.tap_count = output_scale, len(tap_channels)
        self.mixing_weights = nn.Parameter(torch.ones(len(self.taps)))
        self.bottlenecks = nn.ModuleList(
            Bottleneck(tap_channels[tap], projection_dim, norm_groups, time_embed_dim) for tap in self.taps
        )

    def forward(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """(B, projection_dim, H, W) of all taps, with (H, W) the finest one's size times output_scale.

        Raises:
            ValueError: another number of taps.
        """
        if len(features) != self.tap_count:
            raise ValueError(f"features: expected {self.tap_count} taps, got {len(features)}")
        height, width = features[-1].shape[-2:]
        size = (height * self.output_scale, width * self.output_scale)
        weights = self.mixing_weights.softmax(0)
        chosen = [features[tap] for tap in self.taps]
        parts = (net(f, time_embedding, size, w) for w, net, f in zip(weights, self.bottlenecks, chosen, strict=True))
        return functools.reduce(torch.add, parts)
