"""Readout heads, one file each."""

import json
from pathlib import Path

from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.spatial import SpatialHead
from rg.models import locate
from rg.readout import ReadoutHead

HEADS: dict[str, type[ReadoutHead]] = {
    "AppearanceHead": AppearanceHead,
    "CorrespondenceHead": CorrespondenceHead,
    "SpatialHead": SpatialHead,
}


def load_head(folder: str | Path) -> ReadoutHead:
    """Loads whichever head was saved by `save_pretrained`, from its folder or by the name of a shipped one.

    Raises:
        FileNotFoundError: the folder holds no head.json.
        ValueError: it names a class that is not a head of this package.
    """
    record = locate(folder, "heads") / "head.json"
    if not record.is_file():
        raise FileNotFoundError(f"head={folder}: expected a folder with head.json and head.safetensors, found none")
    name = json.loads(record.read_text())["class"]
    if name not in HEADS:
        raise ValueError(f"head={folder}: expected one of the classes {sorted(HEADS)}, found {name!r}")
    return HEADS[name].from_pretrained(folder)
