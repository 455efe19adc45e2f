"""Readout heads, one file each."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rg.heads.base import ReadoutHead

# The module of each class of head that a folder may name.
HEADS = {
    "AppearanceHead": "rg.heads.appearance",
    "CorrespondenceHead": "rg.heads.correspondence",
    "SpatialHead": "rg.heads.spatial",
}


def __getattr__(name: str) -> "type[ReadoutHead]":
    # Looked up on first use: guidance needs the contract alone, and not Lightning.
    if name not in HEADS:
        raise AttributeError(f"module 'rg.heads' has no attribute {name!r}")
    return getattr(import_module(HEADS[name]), name)


def load_head(folder: str | Path, class_path: str | None = None) -> "ReadoutHead":
    """Loads whichever head was saved by `save_pretrained`.

    Args:
        folder: where it was saved, a shipped one's name, or "owner/name" on the hub.
        class_path: of a class that is not of this package, see `import_head`. The folder cannot give it: what a folder
            names is never imported.

    Raises:
        FileNotFoundError: the folder lacks head.json or head.safetensors.
        ValueError: class_path leads to no head, the folder holds a head of another class, or without a class_path one
            that is not of this package, or one of its files is damaged.
    """
    if class_path is not None:
        return import_head(class_path).from_pretrained(folder)
    from rg.heads.base import read_head_record
    from rg.heads.hub import find_folder

    name = read_head_record(find_folder(folder, "heads")).class_name
    if name not in HEADS:
        raise ValueError(
            f"head={folder}: class: expected one of the classes {sorted(HEADS)}, found {name!r}; a class of your own "
            "has to be given too, as head.class=module.Class"
        )
    return __getattr__(name).from_pretrained(folder)


def import_head(class_path: str) -> "type[ReadoutHead]":
    """The head class at "module.Class", which is imported: code of the user's, from the current folder or installed.

    Raises:
        ValueError: there is no such module or class, its import fails, or the class is not a ReadoutHead.
    """
    from rg.heads.base import ReadoutHead

    expected = f"class={class_path}: expected module.Class, a ReadoutHead that can be imported from here"
    module, _, name = str(class_path).rpartition(".")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(expected)
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{expected}; {error}") from error
    if not (isinstance(found, type) and issubclass(found, ReadoutHead)):
        raise ValueError(f"{expected}; found {'nothing' if found is None else repr(found)} of that name in {module}")
    return found
