"""The training of appearance heads: the hinge by hand, weights of negatives, accuracies."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from rg.backbone.diffusion import DiffusionBackbone
from rg.heads.appearance import AppearanceHead

WIDTHS = {"tap_channels": [16, 16, 8, 8], "time_embed_dim": 32, "projection_dim": 16, "norm_groups": 2}
BOTH = {"edited": 1.0, "rendered": 0.0}


def make_head(**hyperparameters):
    torch.manual_seed(0)
    return AppearanceHead(**{**WIDTHS, **hyperparameters})


def readout(*shares):
    """A group of readouts (1, G, 16, 1, 10): the first image, and others that differ from it in a share of places.

    Where they differ they are at right angles: the distance is the share.
    """
    maps = torch.zeros(1, 1 + len(shares), 16, 1, 10)
    maps[:, 0, 0] = 2.0
    for number, share in enumerate(shares, 1):
        count = round(10 * share)
        maps[0, number, 1, 0, :count], maps[0, number, 0, 0, count:] = 1.0, 3.0
    return maps


@pytest.mark.parametrize(("positive", "negative", "loss"), [(0.2, 0.5, 0.2), (0.1, 0.9, 0.0), (0.5, 0.1, 0.9)])
def test_hinge_by_hand(positive, negative, loss):
    torch.testing.assert_close(make_head().loss(readout(positive, negative), {}), torch.tensor(loss))


def test_margin_and_weights_of_the_negatives():
    maps = readout(0.2, 0.5, 0.3)
    torch.testing.assert_close(make_head(margin=1.0, negatives=BOTH).loss(maps, {}), torch.tensor(0.7))
    weighted = make_head(negatives={"edited": 1.0, "lookalike": 3.0})
    torch.testing.assert_close(weighted.loss(maps, {}), torch.tensor((0.2 + 3 * 0.4) / 4))


def test_groups_are_averaged():
    maps = torch.cat([readout(0.2, 0.5), readout(0.5, 0.1)])
    torch.testing.assert_close(make_head().loss(maps, {}), torch.tensor((0.2 + 0.9) / 2))
    positive, negatives = make_head().distances(maps)
    torch.testing.assert_close(positive, torch.tensor([0.2, 0.5]))
    torch.testing.assert_close(negatives, {"edited": torch.tensor([0.5, 0.1])})


def test_another_number_of_images_is_refused():
    words = r"\(B,4,C,H,W\).*\['edited', 'rendered'\].*\(1, 3, 16, 1, 10\)"
    with pytest.raises(ValueError, match=words):
        make_head(negatives=BOTH).loss(readout(0.1, 0.2), {})


@pytest.mark.parametrize("negatives", [{}, {"edited": 0.0}, {"edited": 1.0, "rendered": -1.0}])
def test_weights_are_none_below_zero_and_one_above(negatives):
    with pytest.raises(ValueError, match=rf"negatives: .*at least 0 .*{negatives}"):
        make_head(negatives=negatives)


def test_the_negatives_are_saved_with_the_head(tmp_path):
    for head in (make_head(), make_head(negatives=BOTH)):
        head.save_pretrained(tmp_path)
        assert AppearanceHead.from_pretrained(tmp_path).hparams.negatives == head.hparams.negatives
    assert make_head().hparams.negatives == {"edited": 1.0}


def test_accuracies_are_means_over_all_held_out_groups(tiny_pipeline, tmp_path):
    head = make_head(negatives=BOTH, val_timesteps=[50]).attach_backbone(DiffusionBackbone(tiny_pipeline()))
    generator = torch.Generator().manual_seed(1)

    def group(number):
        latents = torch.randn(4, 4, 8, 8, generator=generator)
        latents[1] = latents[0]
        return {"latent_mean": latents, "latent_std": 0 * latents, "index": number, "epoch": 0}

    batches = DataLoader([group(number) for number in range(3)], batch_size=2)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    (found,) = Trainer(default_root_dir=tmp_path, **quiet).validate(head, batches, verbose=False)
    right = {name: [] for name in BOTH}
    for batch in batches:
        with torch.no_grad():
            positive, negatives = head.distances(head.readout_at(batch, 50))
        for name, distance in negatives.items():
            right[name] += (positive < distance).tolist()
    for name, values in right.items():
        assert found[f"val/accuracy_{name}_t50"] == pytest.approx(sum(values) / 3)
