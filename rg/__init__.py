"""Readout guidance: steer diffusion models by small networks that read their features."""

import os
import sys
from importlib import import_module
from types import TracebackType
from typing import Any

_HOMES = {
    "AppearanceHead": "rg.heads.appearance",
    "CorrespondenceHead": "rg.heads.correspondence",
    "DiffusionBackbone": "rg.backbone.diffusion",
    "EnergyHead": "rg.heads.protocol",
    "FixedTarget": "rg.guidance.targets",
    "FunctionHead": "rg.heads.protocol",
    "GuidanceTerm": "rg.guidance.guidance",
    "ReadoutGuidance": "rg.guidance.guidance",
    "ReadoutGuider": "rg.modular.guider",
    "ReadoutHead": "rg.heads.base",
    "ReferenceTarget": "rg.guidance.targets",
    "SpatialHead": "rg.heads.spatial",
    "generate": "rg.generation",
    "invert": "rg.backbone.inversion",
    "load_control": "rg.io.images",
    "load_head": "rg.heads",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Looked up on first use: rg.points alone should not import diffusers and Lightning.
    if name not in _HOMES:
        raise AttributeError(f"module 'rg' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped: nothing has begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if any(word.startswith(("rg.", "data_prep.", "experiments.")) for word in sys.orig_argv[2:3] if "-m" in sys.orig_argv):
    sys.excepthook = _say_stopped  # a command is stopped while its libraries are loaded
    if "verbose=true" not in sys.orig_argv:
        for library in ("TRANSFORMERS", "DIFFUSERS"):  # what they say while they are loaded
            os.environ.setdefault(f"{library}_VERBOSITY", "error")
if {"-h", "--help"} & set(sys.orig_argv[1:]):
    # Here, before a command's module imports torch.
    from rg.cli import answer_help

    answer_help()
