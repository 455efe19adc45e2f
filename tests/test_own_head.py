"""docs/own_head.md, followed to the letter in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from rg.backbone import DiffusionBackbone
from rg.detectors import KeypointDetector
from rg.heads import load_head
from rg.sampling import generate

pytestmark = pytest.mark.slow

# A file's name above its code, or commands.
BLOCK = re.compile(r"^(?:`([\w./]+)`:\n\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGE = (Path(__file__).parents[1] / "docs" / "own_head.md").read_text()
