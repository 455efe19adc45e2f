"""Models that ship with the package, and how a name finds its folder."""

from pathlib import Path

MODELS = Path(__file__).parent


def locate(name: str | Path, kind: str = ".") -> Path:
    """The folder called `name`: a path as it stands, else a shipped model of that kind ("heads", "." for others).

    Raises:
        FileNotFoundError: neither exists; the message lists the shipped ones.
    """
    for folder in (Path(name), MODELS / kind / name):
        if folder.is_dir():
            return folder
    shipped = sorted(folder.name for folder in (MODELS / kind).glob("[!_]*") if folder.is_dir())
    raise FileNotFoundError(f"no folder {str(name)!r}; expected a path or a shipped name: {shipped}")
