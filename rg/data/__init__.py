"""What is learnt from: labelled images in shards."""

from rg.data.datamodule import ReadoutDataModule

__all__ = ["ReadoutDataModule"]
