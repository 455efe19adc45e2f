import pytest
import torch
from lightning import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from rg.backbone.diffusion import DiffusionBackbone
from rg.callbacks import MixingWeights, ReadoutImages
from rg.heads.spatial import SpatialHead
from rg.io.figures import image_grid, save_figure


def make_batch(count):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1,
        "label": torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1,
        "keypoints": torch.rand(count, 1, 18, 3, generator=generator) * 31,
        "latent_mean": torch.randn(count, 4, 8, 8, generator=generator),
        "latent_std": torch.full((count, 4, 8, 8), 0.1),
        "prompt": ["a person"] * count,
        "index": torch.arange(count),
        "epoch": torch.zeros(count, dtype=torch.int64),
    }


@pytest.mark.parametrize("variant", ["rgb", "keypoints"])
def test_a_fit_leaves_images_and_mixing_weights(tiny_pipeline, tmp_path, variant):
    backbone = DiffusionBackbone(tiny_pipeline())
    widths = {"tap_channels": backbone.tap_channels, "time_embed_dim": backbone.time_embed_dim}
    head = SpatialHead(**widths, variant=variant, projection_dim=16, norm_groups=2, val_timesteps=[50, 600])
    head.attach_backbone(backbone)
    images, weights = ReadoutImages(str(tmp_path), count=2), MixingWeights(str(tmp_path))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        check_val_every_n_epoch=1,
        num_sanity_val_steps=0,
        callbacks=[images, weights],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        inference_mode=False,
    )
    trainer.fit(
        head, DataLoader([make_batch(3)] * 2, batch_size=None), DataLoader([make_batch(3)] * 2, batch_size=None)
    )
    expected = {f"{name}-{step:06d}.png" for name in ("readouts", "mixing_weights") for step in (2, 4)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert len(images.batch["image"]) == len(images.batch["prompt"]) == 2
    for name in expected:
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 2
    assert {f"val/loss_t{t}" for t in (50, 600)} <= set(trainer.callback_metrics)


def test_every_row_of_a_grid_is_shown():
    rows = {"black": torch.zeros(3, 3, 8, 8), "red": torch.zeros(2, 3, 8, 8)}
    rows["red"][:, 0] = 1
    axes = image_grid(rows, side=16).axes
    assert [axis.get_ylabel() for axis in axes] == ["black", "red"]
    shown = [axis.images[0].get_array() for axis in axes]
    assert [array.shape for array in shown] == [(16, 48, 3), (16, 32, 3)]
    assert not shown[0].any() and (shown[1] == [1, 0, 0]).all()


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    figure = image_grid({"row": torch.rand(1, 3, 8, 8)})
    save_figure(figure, tmp_path / "new" / "figure.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]
    with Image.open(tmp_path / "new" / "figure.png") as image:
        image.verify()
