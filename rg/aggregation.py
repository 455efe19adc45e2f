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
        feature = feature.contiguous(memory_format=torch.channels_last)  # as the weights lie; a mixture is slow
        # A bias-free 1x1 convolution commutes with bilinear resizing: it runs on the smaller map.
        hidden = F.relu(self.norm1(_resize(self.conv1(feature), size)))
        if time_embedding is not None:
            hidden = hidden + F.relu(self.time(time_embedding))[:, :, None, None]
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        # w relu(a + b) = relu(w a + w b), and a norm's scale and shift take w for nothing.
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
    """Mixes all taps into one map: sum_l softmax(mixing_weights)_l * Bottleneck_l(feature_l)."""

    def __init__(
        self, *, tap_channels: list[int], time_embed_dim: int, projection_dim: int, norm_groups: int, output_scale: int
    ) -> None:
        super().__init__()
        self.output_scale = output_scale
        self.mixing_weights = nn.Parameter(torch.ones(len(tap_channels)))
        self.bottlenecks = nn.ModuleList(
            Bottleneck(channels, projection_dim, norm_groups, time_embed_dim) for channels in tap_channels
        )

    def forward(self, features: list[Tensor], time_embedding: Tensor | None) -> Tensor:
        """(B, projection_dim, H, W), with (H, W) the finest tap's size times output_scale."""
        height, width = features[-1].shape[-2:]
        size = (height * self.output_scale, width * self.output_scale)
        weights = self.mixing_weights.softmax(0)
        parts = (net(f, time_embedding, size, w) for w, net, f in zip(weights, self.bottlenecks, features, strict=True))
        return functools.reduce(torch.add, parts)
