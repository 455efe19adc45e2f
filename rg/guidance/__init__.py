"""What steers sampling."""

from rg.guidance.guidance import PRESETS, GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget, ReferenceTarget

__all__ = ["PRESETS", "FixedTarget", "GuidanceTerm", "ReadoutGuidance", "ReferenceTarget"]
