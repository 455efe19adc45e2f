"""A page in the browser on which guidance is tried by hand: python -m rg.app"""

import logging
import os
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from rg.cli import OUTPUTS, command

log = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "localhost", "::1")


def check_remote(cfg: DictConfig) -> None:
    """Raises ValueError when others could reach the page that nobody meant to let in."""
    if cfg.host not in LOCAL and not cfg.allow_remote:
        raise ValueError(f"host: expected 127.0.0.1 without allow_remote=true, got {cfg.host}")
    if cfg.allow_remote and not cfg.password:
        raise ValueError("password: expected one with allow_remote=true, got none: password=...")


def load_judges(world: DictConfig) -> dict[str, Any]:
    """The world's judges; one whose network is not there is left out, and said."""
    judges = {}
    for name in world.judges:
        try:
            judges[name] = instantiate(world.detectors[name])
        except Exception as error:
            log.warning("judge %s is left out: %s", name, str(error).splitlines()[0])
    return judges


def start(cfg: DictConfig, words: list[str]) -> Any:
    """Loads the model and serves the page; returns gradio's Blocks, whose server runs in threads of its own.

    Args:
        words: overrides that choose the world.
    """
    check_remote(cfg)
    root = Path(OUTPUTS) / cfg.name
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str((root / "uploads").resolve()))
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ValueError(
            "rg.app: expected the package gradio, found none: make app, or pip install -e '.[app]'"
        ) from None
    from rg.app.jobs import Jobs
    from rg.app.model import Model
    from rg.app.page import serve

    limits = OmegaConf.to_container(cfg.limits)
    jobs = Jobs(seconds=limits["seconds"], waiting=limits["waiting"])
    steps = cfg.world.sampling.num_inference_steps
    model = Model(
        instantiate(cfg.world.backbone), load_judges(cfg.world), words, jobs=jobs, root=root, limits=limits, steps=steps
    )
    auth = (cfg.user, cfg.password) if cfg.password else None
    return serve(model, host=cfg.host, port=cfg.port, auth=auth, upload=limits["upload"])


@command("app", stopped="the page is closed")
def main(cfg: DictConfig) -> None:
    """Serves until it is stopped."""
    words = [word for word in HydraConfig.get().overrides.task if word.lstrip("+~").startswith("world")]
    start(cfg, words).block_thread()


if __name__ == "__main__":
    main()
