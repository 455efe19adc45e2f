"""The frozen diffusion model."""

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert

__all__ = ["DiffusionBackbone", "invert"]
