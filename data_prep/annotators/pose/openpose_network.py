"""The network of OpenPose's COCO model (Cao et al., 2017), by the names of its file body_pose_model.pth."""

import torch
from torch import Tensor, nn
from torch.nn import functional

FIELDS, HEATMAPS = 38, 19  # two channels for each of 19 limbs; 18 keypoints and the background
STRIDE = 8
# Of VGG-19's first ten layers and the two after them: output channels by name; a pooling before each new number.
TRUNK = {
    "conv1_1": 64, "conv1_2": 64, "conv2_1": 128, "conv2_2": 128,
    "conv3_1": 256, "conv3_2": 256, "conv3_3": 256, "conv3_4": 256,
    "conv4_1": 512, "conv4_2": 512, "conv4_3_CPM": 256, "conv4_4_CPM": 128,
}  # fmt: skip
STAGES = 6


class OpenPoseNetwork(nn.Module):
    """Part affinity fields and heatmaps, refined in six stages of two branches."""

    def __init__(self) -> None:
        super().__init__()
        channels = 3
        for name, width in TRUNK.items():
            self.add_module(name, nn.Conv2d(channels, width, 3, padding=1))
            channels = width
        for branch, outputs in (("L1", FIELDS), ("L2", HEATMAPS)):
            sizes = [(128, 128, 3)] * 3 + [(128, 512, 1), (512, outputs, 1)]
            self._add([f"conv5_{number}_CPM_{branch}" for number in range(1, 6)], sizes)
            for stage in range(2, STAGES + 1):
                sizes = [(128 + FIELDS + HEATMAPS, 128, 7)] + [(128, 128, 7)] * 4 + [(128, 128, 1), (128, outputs, 1)]
                self._add([f"Mconv{number}_stage{stage}_{branch}" for number in range(1, 8)], sizes)

    def _add(self, names: list[str], sizes: list[tuple[int, int, int]]) -> None:
        for name, (channels, width, side) in zip(names, sizes, strict=True):
            self.add_module(name, nn.Conv2d(channels, width, side, padding=side // 2))

    def forward(self, images: Tensor) -> Tensor:
        """Fields and heatmaps (B, 38 + 19, H / 8, W / 8) of images (B, 3, H, W), BGR in [-0.5, 0.5)."""
        x = images
        for name in TRUNK:
            if name in ("conv2_1", "conv3_1", "conv4_1"):
                x = functional.max_pool2d(x, 2)
            x = getattr(self, name)(x).relu()
        features = x
        for stage in range(1, STAGES + 1):
            first = stage == 1
            names = ("conv5_{}_CPM_{}", range(1, 6)) if first else (f"Mconv{{}}_stage{stage}_{{}}", range(1, 8))
            x = torch.cat([self._branch(x, *names, branch) for branch in ("L1", "L2")], 1)
            maps, x = x, torch.cat([x, features], 1)
        return maps

    def _branch(self, x: Tensor, pattern: str, numbers: range, branch: str) -> Tensor:
        for number in numbers:
            x = getattr(self, pattern.format(number, branch))(x)
            x = x if number == numbers[-1] else x.relu()
        return x
