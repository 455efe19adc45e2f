"""Folders of results, and the command that makes a result again."""

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from omegaconf import DictConfig

from rg.cli import check_overrides, compose_config, quote_texts
from rg.io.files import write_text
from rg.settings import check


class Run:
    """One result: its folder, its command and the configuration that both the command and the page run.

    Args:
        root: the folder of all results of the page.
        module: of the command, such as rg.sample.
    """

    def __init__(self, root: Path, module: str) -> None:
        self.folder = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid4().hex[:8]}"
        self.module = module
        self.folder.mkdir(parents=True)
        self.words: list[str] = []

    @property
    def command(self) -> str:
        """The line for a shell, in the folder that the page was started in."""
        return shlex.join(["python", "-m", self.module, *self.words])

    def compose(self, words: Sequence[str]) -> DictConfig:
        """The command's configuration with these overrides, which are kept with it in command.txt.

        Raises:
            ValueError: one of them is no setting, or of another type or range.
        """
        self.words = list(words)
        name = self.module.split(".")[-1]
        check_overrides(name, self.words)
        cfg = compose_config(name, quote_texts(self.words))
        cfg.run_dir = str(self.folder)  # Hydra's own, where there is a command line
        check(cfg)
        write_text(self.folder / "command.txt", f"{self.command}\n")
        return cfg

    def discard(self) -> None:
        """Removes the folder of a run that made nothing."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()
