"""Run folders that never collide and can be resumed, and errors that end a command with one line."""

import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.utils import logging as diffusers_logging
from omegaconf import DictConfig, OmegaConf
from transformers.utils import logging as transformers_logging

from rg.heads import load_head, released
from rg.heads.base import ReadoutHead

OUTPUTS = "outputs"
# ImportError: Hydra found no such _target_.
BAD_INPUT = (ValueError, FileNotFoundError, FloatingPointError, ImportError)
_chosen: dict[tuple[str, str], str] = {}


def run_folder(name: str, overrides: str, resume: bool | str) -> str:
    """<name>/<time>-<process>-<hash of overrides>, relative to outputs/.

    With resume=True it is the newest one with the same hash, with "unfinished" only if that has no results.json yet.
    The same run asks more than once while its configuration is resolved; it gets the same answer.
    """
    if resume not in (True, False, "unfinished"):
        raise ValueError(f"resume: expected true, false or unfinished, got {resume!r}")
    key = (name, overrides)
    if key not in _chosen:
        code = hashlib.sha256(overrides.encode()).hexdigest()[:8]
        earlier = sorted((Path(OUTPUTS) / name).glob(f"*-{code}"))[-1:] if resume else []
        if resume == "unfinished":
            earlier = [folder for folder in earlier if not (folder / "results.json").exists()]
        fresh = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{code}"
        _chosen[key] = f"{name}/{earlier[0].name if earlier else fresh}"
    return _chosen[key]


OmegaConf.register_new_resolver("run_folder", run_folder, replace=True)


# W&B's id of a run follows from its folder: a resumed run continues its own charts.
OmegaConf.register_new_resolver("run_id", lambda folder: "-".join(Path(folder).parts[-2:]), replace=True)


def point_latest(run_dir: Path) -> None:
    """Makes <run_dir>/../latest a link to run_dir, in one step."""
    link = run_dir.parent / "latest"
    temporary = run_dir.parent / f".latest-{os.getpid()}"
    temporary.symlink_to(run_dir.name)
    temporary.replace(link)


def quiet_libraries() -> None:
    """Keeps diffusers and transformers to errors: their bars and notices would drown the command's own lines."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def clear_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ends a command with one line where input, files or numbers are bad, instead of a stack trace."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        quiet_libraries()
        try:
            return command(*args, **kwargs)
        except Exception as error:
            # Hydra wraps what a constructor raises in an exception of its own.
            bad_input = next((e for e in (error, error.__cause__) if isinstance(e, BAD_INPUT)), None)
            if bad_input is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise SystemExit(f"error: {bad_input}") from None

    return wrapped


CONF = Path(__file__).parents[1] / "conf"


def choose_head(choice: DictConfig, family: str) -> ReadoutHead:
    """The head of a command: `head.released`, one of the authors' by name or file, where it is given, else `head.path`,
    which `head.class` reads where that is a class of the user's own.

    Args:
        family: the world's family of backbones, for which a released head is taken.

    Raises:
        FileNotFoundError, ValueError: see rg.heads.released.load and rg.heads.load_head.
    """
    if choice.released is not None:
        return released.load(choice.released, family=family)
    return load_head(choice.path, choice["class"])
