"""Readout guidance as a component of diffusers' modular pipelines."""

from rg.modular.guider import ReadoutGuider

__all__ = ["ReadoutGuider"]
