"""What steers sampling."""

from rg.guidance.guidance import PRESETS, GuidanceTerm, ReadoutGuidance
from rg.guidance.rules import RULES, Repeats
from rg.guidance.targets import FixedTarget, ReferenceTarget

__all__ = ["PRESETS", "RULES", "FixedTarget", "GuidanceTerm", "ReadoutGuidance", "ReferenceTarget", "Repeats"]
