"""The training of the embedded model in its smallest form: 8 images, 3 steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

TINY = [
    *("pictures={train:8,held_out:4,workers:1,sided:false}", "autoencoder.widths=[8,8,8]"),
    *("autoencoder.steps=3", "autoencoder.batch_size=2", "autoencoder.warm_up=1", "autoencoder.decay=0.4"),
    *("denoiser.unet.block_out_channels=[8,8,8]", "denoiser.unet.norm_num_groups=4"),
    "denoiser.text={hidden_size:8,intermediate_size:8,num_hidden_layers:1,num_attention_heads:2}",
    *("denoiser.steps=3", "denoiser.batch_size=4", "denoiser.warm_up=1", "denoiser.decay=0.4"),
]


@pytest.fixture(scope="session")
def training(root: Path) -> Callable[..., dict[str, Any]]:
    """Makes settings of experiments.marionette.train that work below a folder: `training(tmp_path, "stage=unet")`."""

    def build(folder: Path, *overrides: str) -> dict[str, Any]:
        places = [f"folder={folder}/work", f"export={folder}/models"]
        with initialize_config_dir(config_dir=str(root / "conf"), version_base="1.3"):
            return OmegaConf.to_container(
                compose("experiments/marionette_train", [*TINY, *places, *overrides]), resolve=True
            )

    return build
