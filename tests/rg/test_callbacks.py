import os
import resource

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from torch.utils.data import DataLoader

from rg.backbone.diffusion import DiffusionBackbone
from rg.callbacks import Checkpoints, MixingWeights, Progress, ReadoutImages, digest, newest_checkpoint, read_checkpoint
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
def test_a_fit_leaves_images_and_mixing_weights(tiny_pipeline, tmp_path, variant, capsys):
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
        callbacks=[images, weights, Progress()],
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        inference_mode=False,
    )
    trainer.fit(
        head, DataLoader([make_batch(3)] * 2, batch_size=None), DataLoader([make_batch(3)] * 2, batch_size=None)
    )
    shown = capsys.readouterr().err
    shown = shown[shown.index("training:") :]  # behind what libraries warn of
    assert shown.count("\n") == 1 and "4/4" in shown and "loss 0." in shown, "one bar, without a line for each refresh"
    expected = {f"{name}-{step:06d}.png" for name in ("readouts", "mixing_weights") for step in (2, 4)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert len(images.batch["image"]) == len(images.batch["prompt"]) == 2
    for name in expected:
        with Image.open(tmp_path / name) as image:
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 2
    assert {f"val/loss_t{t}" for t in (50, 600)} <= set(trainer.callback_metrics)


def test_previews_are_read_in_batches_and_over_batches(tiny_pipeline, tmp_path):
    backbone = DiffusionBackbone(tiny_pipeline())
    widths = {"tap_channels": backbone.tap_channels, "time_embed_dim": backbone.time_embed_dim}
    head = SpatialHead(**widths, variant="rgb", projection_dim=16, norm_groups=2, val_timesteps=[50])
    head.attach_backbone(backbone)
    images, sizes = ReadoutImages(str(tmp_path), count=5, batch_size=2), []
    trainer = Trainer(accelerator="cpu", callbacks=[images], logger=False, default_root_dir=tmp_path)
    for _ in range(2):  # a second validation begins anew
        for number in range(3):
            images.on_validation_batch_end(trainer, head, None, make_batch(2), number)
        assert len(images.batch["image"]) == len(images.batch["prompt"]) == 5
    watch = head.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0][0])))
    images.on_validation_end(trainer, head)
    watch.remove()
    assert sizes == [2, 2, 1] and (tmp_path / "readouts-000000.png").is_file()


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


def make_checkpoint(step):
    tensors = {
        "weight": torch.randn(3, 4),
        "none": torch.zeros(0),
        "half": torch.ones(2).half(),
        "on": torch.tensor(True),
    }
    return {"global_step": step, "state_dict": tensors, "loops": {"done": (1, 2.5, None, "x")}, "lrs": [1e-3]}


def save(folder, *steps):
    for step in steps:
        Checkpoints().save_checkpoint(make_checkpoint(step), folder / "last.ckpt")


def test_the_newest_checkpoint_and_the_one_before_are_kept(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 1, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert Checkpoints().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 2
    assert newest_checkpoint(tmp_path) == tmp_path / "last.ckpt"


def test_a_damaged_checkpoint_never_takes_the_place_of_a_whole_one(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "last.ckpt").write_bytes(b"nothing")
    assert newest_checkpoint(tmp_path) == tmp_path / "previous.ckpt"
    save(tmp_path, 3)
    assert [read_checkpoint(tmp_path / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [3, 1]


def test_no_mutation_goes_unnoticed(tmp_path):
    """What loads is what was saved; all else is refused by a line that names the file."""
    save(tmp_path, 7)
    path, rng = tmp_path / "last.ckpt", np.random.default_rng(0)
    whole, expected = path.read_bytes(), digest(read_checkpoint(path))
    for _ in range(100):
        data = bytearray(whole)
        if rng.random() < 0.2:
            del data[int(rng.integers(len(data))) :]
        else:
            data[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(data))
        try:
            found = read_checkpoint(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:
            assert digest(found) == expected


@pytest.mark.parametrize("change", [{"global_step": 8}, {"lrs": [2e-3]}, {"lrs": None}, {"more": 1}])
def test_content_that_is_not_what_was_saved_is_refused(tmp_path, change):
    save(tmp_path, 7)
    path = tmp_path / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt: .*digest"):
        read_checkpoint(path)
    torch.save({key: value for key, value in make_checkpoint(7).items() if key != "lrs"}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt: .*digest"):
        read_checkpoint(path)


def test_whenever_saving_is_killed_a_whole_checkpoint_is_left(tmp_path, kill_when):
    kill_when((tmp_path / "previous.ckpt").is_file, save, tmp_path, *range(100_000))
    assert newest_checkpoint(tmp_path) is not None


def test_a_full_disk_leaves_the_checkpoints_as_they_were(tmp_path):
    save(tmp_path, 1, 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt'$"):
            save(tmp_path, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_checkpoint_that_is_gone_is_said(tmp_path, caplog):
    save(tmp_path, 1, 2)
    (tmp_path / "last.ckpt").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "previous.ckpt" and "last.ckpt" in caplog.text
    os.mkfifo(tmp_path / "last.ckpt")  # is not waited for
    assert newest_checkpoint(tmp_path) == tmp_path / "previous.ckpt"
