"""Labelled images for training: an endless reshuffled order that resumes exactly, and the DataModule."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchdata.stateful_dataloader import StatefulDataLoader

from rg.data.samples import Batch, DataError, Groups, Samples
from rg.data.shards import Manifest, read_shards

log = logging.getLogger(__name__)


class ShuffledEpochs(Dataset[Batch]):
    """Epoch after epoch of n samples, each in an order of its own: position p is in epoch p // n."""

    def __init__(self, *, samples: Samples | Groups | Subset[Batch], seed: int) -> None:
        self.samples = samples
        self.seed = seed
        self._order = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> Batch:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[Batch]:
        """The samples of a batch, which torch's loader asks for at once."""
        numbers = [position // len(self.samples) for position in positions]
        samples = self.samples.__getitems__([self._place(position) for position in positions])
        return [sample | {"epoch": number} for sample, number in zip(samples, numbers, strict=True)]

    def _place(self, position: int) -> int:
        number, place = divmod(position, len(self.samples))
        if self._order[0] != number:
            self._order = number, np.random.default_rng((self.seed, number)).permutation(len(self.samples))
        return int(self._order[1][place])


class ResumableSampler(DistributedSampler[Batch]):
    """Which positions one rank sees: step k takes the k-th block of ranks x batch_size of them, a part per rank.

    It counts what it has given, over all epochs; that count is its whole state, and Lightning's epoch is not read:
    a checkpoint of a run that ended in mid-epoch says that the epoch is over.
    It is a DistributedSampler because Lightning replaces every other sampler when there are several ranks.
    """

    def __init__(self, epochs: ShuffledEpochs, *, batch_size: int, epoch_batches: int, rank: int, ranks: int) -> None:
        super().__init__(epochs, num_replicas=ranks, rank=rank, shuffle=False)
        self.batch_size = batch_size
        self.epoch_batches = epoch_batches
        self.given = 0

    def __len__(self) -> int:
        return self.epoch_batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """The rest of the epoch."""
        for _ in range(len(self) - self.given % len(self)):
            step, item = divmod(self.given, self.batch_size)
            self.given += 1
            yield (step * self.num_replicas + self.rank) * self.batch_size + item

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def hold_out(samples: Samples | Groups, folder: Path) -> tuple[Subset[Batch], Subset[Batch]]:
    """Training and held-out images of a set that has none held out: a tenth of it is, at least one.

    Raises:
        DataError: there are fewer than two.
    """
    count = len(samples)
    if count < 2:
        raise DataError(
            f"{folder}: expected at least 2 images, one of them to validate with, found {count}: add images, or take "
            "fewer for tests, pictures.test_share=0"
        )
    places = np.random.default_rng(0).permutation(count).tolist()
    held_out = max(count // 10, 1)
    return Subset(samples, sorted(places[held_out:])), Subset(samples, sorted(places[:held_out]))


class ReadoutDataModule(LightningDataModule):
    """The training and held-out images of one head.

    Args:
        root: folder that holds one folder per split.
        size: number of training images; None takes all.
        val_size: number of held-out images; None takes all, and where there is none a tenth of the training images.
        batch_size: images, or groups of them, per batch and rank.
        epoch_batches: training batches per epoch and rank.
        seed: of the subset (with `available`) and of the order.
        available: see `read_shards`.
        builder: makes what is missing, called as builder(split=..., n=...); None: all is there.
        val_batch_size: held-out images, or groups, per batch; None: `batch_size`.
        autoencoder_id: of the backbone that will read the latents; None accepts any.
    """

    def __init__(
        self,
        *,
        root: str,
        size: int | None,
        val_size: int | None,
        batch_size: int,
        epoch_batches: int,
        seed: int = 0,
        available: int | None = None,
        builder: Callable[..., Any] | None = None,
        val_batch_size: int | None = None,
        autoencoder_id: str | None = None,
    ) -> None:
        super().__init__()
        counts = {"size": size, "val_size": val_size, "available": available}
        counts |= {"batch_size": batch_size, "val_batch_size": val_batch_size, "epoch_batches": epoch_batches}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"expected at least 1, got {count}, change `{name}=...`")
        if available is not None and (size or 0) > available:
            raise ValueError(f"expected size <= available, got size={size}, available={available}")
        self.root = Path(root)
        self.size, self.val_size, self.available = size, val_size, available
        self.batch_size, self.epoch_batches, self.seed = batch_size, epoch_batches, seed
        self.val_batch_size = val_batch_size or batch_size
        self.builder = builder
        self.autoencoder_id = autoencoder_id

    def prepare_data(self) -> None:
        """Makes missing shards with the builder, which does nothing where all is there and refuses other settings."""
        if self.builder is not None:
            self.builder(split="train", n=self.available or self.size)
            try:
                self.builder(split="val", n=self.val_size)
            except DataError:
                # A small folder may deal validation no image, and then nothing is begun.
                if self.val_size is not None or (self.root / "val" / "manifest.json").is_file():
                    raise

    def setup(self, stage: str) -> None:
        """Reads the splits that the stage needs into memory, and says what was dealt.

        Raises:
            DataError: see `read_shards` and `hold_out`.
        """
        held_out = self.val_size is not None or self._has_validation()
        if stage == "fit" or not held_out:
            chosen = {"size": self.size, "available": self.available, "seed": self.seed}
            self.train_set = read_shards(self.root / "train", autoencoder_id=self.autoencoder_id, **chosen)
        if held_out:
            self.val_set = read_shards(self.root / "val", self.val_size, autoencoder_id=self.autoencoder_id)
        else:
            self.train_set, self.val_set = hold_out(self.train_set, self.root / "train")
        if stage == "fit":
            own = "" if held_out else ", taken from the training images as the folder deals none"
            log.info("%s: %d to train, %d to validate%s", self.root, len(self.train_set), len(self.val_set), own)

    def labelled_by(self) -> str | None:
        """The class of the annotator that made the training labels; None where the manifest does not say it."""
        annotator = Manifest.read(self.root / "train").settings.get("annotator")
        target = annotator.get("_target_") if isinstance(annotator, dict) else None
        return target.rpartition(".")[2] if isinstance(target, str) else None

    def _has_validation(self) -> bool:
        folder = self.root / "val"
        if self.builder is None or (folder / "manifest.json").is_file():
            return bool(Manifest.read(folder).indices())
        return False

    def train_dataloader(self) -> StatefulDataLoader:
        """`epoch_batches` batches per epoch and rank; resumes in the middle of an epoch exactly."""
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        epochs = ShuffledEpochs(samples=self.train_set, seed=self.seed)
        places = {"batch_size": self.batch_size, "epoch_batches": self.epoch_batches, "rank": rank, "ranks": ranks}
        # Its own generator: a loader otherwise draws a number from the global one whenever it is started.
        generator = torch.Generator().manual_seed(self.seed)
        sampler = ResumableSampler(epochs, **places)
        return StatefulDataLoader(epochs, batch_size=self.batch_size, sampler=sampler, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch]:
        """All held-out images in order, the last batch as short as it is.

        With several ranks Lightning splits them, and repeats at most ranks - 1 images to make the parts equal.
        """
        return DataLoader(self.val_set, batch_size=self.val_batch_size)
