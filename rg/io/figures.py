"""Image grids and charts; alone knows matplotlib."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Tensor

from rg.io.files import atomic

matplotlib.use("Agg")


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all, and closes it."""
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
    plt.close(figure)


def image_grid(rows: dict[str, Tensor], side: int = 96) -> Any:
    """A figure with one labelled row per entry; every entry is (N, 3, H, W) in [0, 1]."""
    columns = max(len(row) for row in rows.values())
    figure, axes = plt.subplots(len(rows), 1, figsize=(columns * side / 96, len(rows) * side / 96), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        shown = F.interpolate(images.detach().float().cpu(), (side, side), mode="nearest")
        axis.imshow(np.concatenate(list(shown.permute(0, 2, 3, 1).numpy()), axis=1).clip(0, 1))
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.subplots_adjust(hspace=0.03)
    return figure


def bar_chart(bars: dict[str, float], *, x: str, y: str) -> Any:
    """A figure with one bar per entry, and the axes' names."""
    figure, axis = plt.subplots(figsize=(4, 2.2))
    axis.bar(list(bars), list(bars.values()))
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    return figure


def curves(panels: dict[tuple[str, str], dict[str, list[tuple[float, float, str]]]]) -> Any:
    """A figure with a panel for each (x, y) of names: a labelled line for each entry, through points (x, y, text)."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), squeeze=False)
    for axis, ((x, y), lines) in zip(axes[0], panels.items(), strict=True):
        for name, points in lines.items():
            across, up, texts = zip(*points, strict=True)
            axis.plot(across, up, marker="o", markersize=4, linewidth=1, label=name)
            for place in zip(across, up, texts, strict=True):
                axis.annotate(place[2], place[:2], xytext=(3, 3), textcoords="offset points", fontsize=6)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    axes[0, -1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.tight_layout()
    return figure
