import itertools
from pathlib import Path

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from rg.data.datamodule import ReadoutDataModule, ResumableSampler, ShuffledEpochs
from rg.data.samples import DataError
from rg.data.shards import Manifest, read_shards

SETTINGS = {"size": 12, "val_size": 5, "batch_size": 4, "epoch_batches": 5}


@pytest.fixture
def root(tmp_path, make_split) -> Path:
    make_split(tmp_path / "train", 12)
    make_split(tmp_path / "val", 7)
    return tmp_path


def test_every_pass_is_a_permutation_of_its_own(root):
    epochs = ShuffledEpochs(samples=read_shards(root / "train"), seed=0)
    drawn = [epochs[position] for position in range(36)]
    orders = [[int(item["index"]) for item in drawn[start : start + 12]] for start in (0, 12, 24)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert [item["epoch"] for item in drawn] == [0] * 12 + [1] * 12 + [2] * 12
    assert [int(epochs[position]["index"]) for position in (30, 5)] == [orders[2][6], orders[0][5]]
    other = ShuffledEpochs(samples=read_shards(root / "train"), seed=1)
    assert [int(other[position]["index"]) for position in range(12)] != orders[0]


def test_epochs_follow_without_a_gap_and_ranks_share_them(root):
    epochs = ShuffledEpochs(samples=read_shards(root / "train"), seed=0)
    alone = ResumableSampler(epochs, batch_size=4, epoch_batches=5, rank=0, ranks=1)
    assert len(alone) == 20
    assert list(alone) + list(alone) == list(range(40))
    pair = [ResumableSampler(epochs, batch_size=4, epoch_batches=5, rank=rank, ranks=2) for rank in (0, 1)]
    first, second = ([list(sampler), list(sampler)] for sampler in pair)
    assert first[1][:8] == [40, 41, 42, 43, 48, 49, 50, 51]
    assert sorted(first[0] + second[0]) == list(range(40)) and sorted(first[1] + second[1]) == list(range(40, 80))


def test_positions_continue_from_their_state(root):
    epochs = ShuffledEpochs(samples=read_shards(root / "train"), seed=0)
    sampler, other = (ResumableSampler(epochs, batch_size=4, epoch_batches=5, rank=0, ranks=1) for _ in range(2))
    assert list(itertools.islice(itertools.chain(sampler, sampler), 27)) == list(range(27))
    other.load_state_dict(sampler.state_dict())
    assert [list(other), list(other)] == [list(range(27, 40)), list(range(40, 60))]


def test_size_below_the_batch(root):
    data = ReadoutDataModule(root=str(root), **SETTINGS | {"size": 3})
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) == 5 and all(len(batch["index"]) == 4 for batch in batches)
    assert torch.cat([batch["epoch"] for batch in batches]).tolist() == [place // 3 for place in range(20)]


def test_batches(root):
    data = ReadoutDataModule(root=str(root), **SETTINGS, autoencoder_id="a" * 16)
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name != "prompt"}
    assert shapes == {
        "image": (4, 3, 8, 8),
        "label": (4, 3, 8, 8),
        "keypoints": (4, 2, 18, 3),
        "latent_mean": (4, 2, 2, 2),
        "latent_std": (4, 2, 2, 2),
        "index": (4,),
        "epoch": (4,),
    }
    assert batch["prompt"] == [f"image {index}" for index in batch["index"].tolist()]
    assert batch["index"].dtype == batch["epoch"].dtype == torch.int64
    held_out = list(data.val_dataloader())
    assert torch.cat([batch["index"] for batch in held_out]).tolist() == list(range(5))
    assert [len(batch["index"]) for batch in held_out] == [4, 1]


def test_the_loader_leaves_the_global_generator_alone(root):
    data = ReadoutDataModule(root=str(root), **SETTINGS)
    data.setup("fit")
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    assert torch.equal(before, torch.get_rng_state())


def test_builder_is_asked_for_what_is_wanted(tmp_path, make_split):
    asked = []

    def builder(*, split, n):
        asked.append((split, n))
        make_split(tmp_path / split, n)

    data = ReadoutDataModule(root=str(tmp_path), **SETTINGS, available=20, builder=builder)
    data.prepare_data()
    data.setup("fit")
    assert asked == [("train", 20), ("val", 5)] and len(data.train_set) == 12
    assert data.train_set.index.max() >= 12


def test_without_builder_what_is_missing_is_named(root):
    small = ReadoutDataModule(root=str(root), **SETTINGS | {"size": 13})
    nowhere = ReadoutDataModule(root=str(root / "elsewhere"), **SETTINGS)
    for data, named in ((small, f"{root}/train.* 13 .* 12 "), (nowhere, f"{root}/elsewhere/train")):
        data.prepare_data()
        with pytest.raises(DataError, match=named):
            data.setup("fit")


def test_autoencoder_is_checked(root):
    with pytest.raises(DataError, match=r"autoencoder other.* found \w+"):
        ReadoutDataModule(root=str(root), **SETTINGS, autoencoder_id="other").setup("validate")


def test_held_out_images_have_a_batch_size_of_their_own(root):
    data = ReadoutDataModule(root=str(root), **SETTINGS, val_batch_size=2)
    data.setup("fit")
    assert [len(batch["index"]) for batch in data.val_dataloader()] == [2, 2, 1]
    assert len(next(iter(data.train_dataloader()))["index"]) == 4


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"size": 0}, {"val_size": -1}, {"available": 11}])
def test_bad_numbers(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ReadoutDataModule(root="nowhere", **SETTINGS | change)


class Recorder(LightningModule):
    """One weight, and the list of what it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((batch["index"].tolist(), batch["epoch"].tolist()))
        return (self.weight - batch["image"].mean()) ** 2

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(root, folder, *, max_steps, checkpoint=None):
    model, data = Recorder(), ReadoutDataModule(root=str(root), **SETTINGS)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=[saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
    return model, trainer


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_resume_equals_the_uninterrupted_run(root, tmp_path, stop):
    whole, _ = fit(root, tmp_path / "whole", max_steps=13)
    assert len(whole.seen) == 13
    first, trainer = fit(root, tmp_path / "part", max_steps=stop)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    # What a killed run leaves, a checkpoint of a later run's middle, and what a finished run saves at its end.
    for checkpoint in (f"part/step={stop}.ckpt", f"whole/step={stop}.ckpt", "end.ckpt"):
        second, _ = fit(root, tmp_path / "again", max_steps=13, checkpoint=tmp_path / checkpoint)
        assert first.seen + second.seen == whole.seen, checkpoint
        assert torch.equal(second.weight, whole.weight), checkpoint


def no_image_in_validation(*, split, n):
    """A builder as of a small folder that deals validation no image."""
    if split == "val":
        raise DataError("split=val: expected at least 1 image, found 0")


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (9, 1), (30, 3)])
def test_a_small_folder_without_validation_images_holds_some_out(tmp_path, make_split, caplog, count, held_out):
    make_split(tmp_path / "train", count)
    settings = SETTINGS | {"size": None, "val_size": None, "builder": no_image_in_validation}
    found = []
    for stage in ("fit", "validate"):
        data = ReadoutDataModule(root=str(tmp_path), **settings)
        data.prepare_data()
        with caplog.at_level("INFO"):
            data.setup(stage)
        places = [{int(sample["index"]) for sample in samples} for samples in (data.train_set, data.val_set)]
        assert len(places[1]) == held_out and places[0] | places[1] == set(range(count)) and not places[0] & places[1]
        found.append(places)
    assert found[0] == found[1], "the same ones are held out whenever it is asked"
    assert f"{count - held_out} to train, {held_out} to validate" in caplog.text
    assert len(next(iter(data.val_dataloader()))["index"]) == held_out
    assert len(next(iter(data.train_dataloader()))["index"]) == 4


def test_validation_images_that_are_all_unreadable_are_replaced(tmp_path, make_split):
    make_split(tmp_path / "train", 12)
    make_split(tmp_path / "val", 2, skipped=(0, 1))
    data = ReadoutDataModule(root=str(tmp_path), **SETTINGS | {"size": None, "val_size": None})
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set)) == (11, 1)


def test_a_lonely_image_cannot_be_validated(tmp_path, make_split):
    make_split(tmp_path / "train", 1)
    settings = SETTINGS | {"size": None, "val_size": None, "builder": no_image_in_validation}
    data = ReadoutDataModule(root=str(tmp_path), **settings)
    data.prepare_data()
    with pytest.raises(DataError, match="at least 2 .* 1.*test_share"):
        data.setup("fit")


def test_other_failures_of_validation_images_are_not_hidden(root):
    def build(*, split, n):
        if split == "val":
            raise DataError("made otherwise")

    for size in (None, 5):
        data = ReadoutDataModule(root=str(root), **SETTINGS | {"val_size": size, "builder": build})
        with pytest.raises(DataError, match="made otherwise"):
            data.prepare_data()


def test_what_was_dealt_is_said(root, caplog):
    with caplog.at_level("INFO"):
        ReadoutDataModule(root=str(root), **SETTINGS).setup("fit")
    assert "12 to train, 5 to validate" in caplog.text


def test_who_labelled_is_read_from_the_manifest(root):
    data = ReadoutDataModule(root=str(root), **SETTINGS)
    assert data.labelled_by() is None
    manifest = Manifest.read(root / "train")
    manifest.settings["annotator"] = {"_target_": "data_prep.annotators.pose.openpose.OpenPose", "side": 368}
    manifest.write(root / "train")
    assert data.labelled_by() == "OpenPose"
