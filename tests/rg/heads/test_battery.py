"""What every head must do, for each yaml under conf/head; a new yaml is taken up by itself."""

import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Trainer
from torch.utils.data import DataLoader

import rg.train  # noqa: F401  registers what the config interpolates
from rg.backbone.diffusion import DiffusionBackbone
from rg.heads import HEADS, load_head
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import RelativeHead, pick
from rg.points import draw_skeletons

CONF = Path(__file__).parents[3] / "conf"
TAPS, SIZES, EMBEDDING, IMAGE = [8, 16, 4], [2, 2, 4], 6, (32, 32)
TINY = ["world.projection_dim=16", "world.norm_groups=2", "world.hidden_channels=8", "world.output_scale=1"]
CASES = [
    (path.stem, variant)
    for path in sorted(CONF.glob("head/[!_]*.yaml"))
    for variant in (("rgb", "keypoints") if "pose_variant" in path.read_text() else ("rgb",))
]


def images_of(head):
    """Images of a sample of a head: one, a pair, or an anchor, a positive and negatives."""
    if isinstance(head, AppearanceHead):
        return 2 + len(head.hparams.negatives)
    return 2 if isinstance(head, CorrespondenceHead) else 1


# Cells of a 4x4 readout: where three points are in the first image of a pair, and in the second.
SOURCE, DESTINATION = torch.tensor([[[0, 0], [3, 1], [1, 3]]]), torch.tensor([[[2, 2], [0, 3], [3, 0]]])


@pytest.fixture(params=CASES, ids="-".join)
def make_head(request):
    """Makes the head of one yaml at tiny size: `make_head(head_key=value, ...)`."""
    name, variant = request.param

    def make(**keywords):
        torch.manual_seed(0)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", [f"head={name}", f"world.pose_variant={variant}", *TINY])
        widths = {"tap_channels": TAPS, "time_embed_dim": EMBEDDING}
        return instantiate(config.head, **{**widths, **keywords}, _convert_="all")

    return make


def make_features(head, dtype=torch.float32, batch=2):
    generator = torch.Generator().manual_seed(1)
    batch *= images_of(head)
    maps = [torch.randn(batch, c, s, s, generator=generator, dtype=dtype) for c, s in zip(TAPS, SIZES, strict=True)]
    return maps, torch.randn(batch, EMBEDDING, generator=generator, dtype=dtype)


def make_batch(head, dtype=torch.float32, batch=2, latent_side=4):
    generator = torch.Generator().manual_seed(2)
    group = (images_of(head),) if isinstance(head, RelativeHead) else ()
    points = 4 + 24 * torch.rand(batch, 1, 18, 2, generator=generator, dtype=dtype)
    keypoints = torch.cat([points, torch.ones(batch, 1, 18, 1, dtype=dtype)], -1)
    pair = torch.cat([SOURCE, DESTINATION]).transpose(0, 1).to(dtype) * 8 + 3.5  # centres of cells of 8x8 pixels
    return {
        "image": torch.rand(batch, *group, 3, *IMAGE, generator=generator, dtype=dtype) * 2 - 1,
        "label": draw_skeletons(keypoints, IMAGE, IMAGE, 2.0) * 2 - 1,
        "keypoints": keypoints,
        "points": torch.cat([pair, torch.ones_like(pair[..., :1])], -1).expand(batch, -1, -1, -1),
        "latent_mean": torch.randn(batch, *group, 4, latent_side, latent_side, generator=generator, dtype=dtype),
        "latent_std": torch.full((batch, *group, 4, latent_side, latent_side), 0.1, dtype=dtype),
        "index": torch.arange(batch),
        "epoch": torch.zeros(batch, dtype=torch.int64),
    }


def loss_of(head, readout, batch):
    """The loss; readouts of all images of a batch one after the other are put in groups for relative heads."""
    return head.loss(
        readout.unflatten(0, (len(batch["index"]), -1)) if isinstance(head, RelativeHead) else readout, batch
    )


def goal(head, batch, readout):
    """What the energy compares a readout with, and its further arguments: a label, or the next image's readout."""
    if not isinstance(head, RelativeHead):
        return encoded(head, batch, readout), {}
    reference = readout.detach().roll(1, 0)
    if isinstance(head, AppearanceHead):
        return reference, {}
    return pick(reference, SOURCE), {"source": SOURCE, "destination": DESTINATION}


def encoded(head, batch, readout):
    return head.encode_target(batch["keypoints"], readout_size=tuple(readout.shape[-2:]), image_size=IMAGE)


def test_gradients_of_loss_and_energy_by_the_readout(make_head):
    head = make_head().double()
    batch = make_batch(head, torch.float64)
    readout = head(*make_features(head, torch.float64)).detach().requires_grad_()
    target, further = goal(head, batch, readout)
    # In random directions: one by one, the elements of whole groups take seconds.
    assert torch.autograd.gradcheck(lambda r: loss_of(head, r, batch), readout, fast_mode=True)
    assert torch.autograd.gradcheck(lambda r: head.energy(r, target, **further), readout, fast_mode=True)


def test_gradients_of_loss_and_energy_by_the_features(make_head):
    head = make_head().double()
    batch, (maps, embedding) = make_batch(head, torch.float64), make_features(head, torch.float64)
    target, further = goal(head, batch, head(maps, embedding))
    leaves = [m.requires_grad_() for m in maps]

    def check(f):
        return torch.autograd.gradcheck(f, leaves, fast_mode=True)

    assert check(lambda *m: loss_of(head, head(list(m), embedding), batch))
    assert check(lambda *m: head.energy(head(list(m), embedding), target, **further))


def test_readout_does_not_depend_on_the_neighbours(make_head):
    head = make_head().eval()
    maps, embedding = make_features(head)
    together = head(maps, embedding)
    torch.testing.assert_close(head([m[1:] for m in maps], embedding[1:]), together[1:])


def test_one_batch_is_learnt(make_head):
    head = make_head()
    batch, (maps, embedding) = make_batch(head), make_features(head)
    if not head.hparams.get("sparse", True):
        # Depth is no line on black: at the lower end of its range, where tanh is flat, lies a part of it alone.
        batch["label"] = torch.linspace(-1, 1, IMAGE[0])[:, None].expand(2, 3, *IMAGE)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    losses = []
    for step in range(150):
        losses.append(loss_of(head, head(maps, embedding), batch))
        optimizer.zero_grad()
        losses[-1].backward()
        if step == 0:  # later on a hinge may have nothing left to learn
            assert all(parameter.grad is not None and parameter.grad.any() for parameter in head.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] / 10, f"{losses[0]:.4f} -> {losses[-1]:.4f}"


def test_a_step_down_the_gradient_lowers_the_energy(make_head):
    head = make_head().eval().requires_grad_(False)
    batch, (maps, embedding) = make_batch(head), make_features(head)
    leaves = [m.requires_grad_() for m in maps]
    target, further = goal(head, batch, head(maps, embedding))
    before = head.energy(head(leaves, embedding), target, **further)
    slopes = torch.autograd.grad(before.sum(), leaves)
    length = sum(s.square().sum() for s in slopes).sqrt()
    moved = [m - 0.05 * s / length for m, s in zip(maps, slopes, strict=True)]
    after = head.energy(head(moved, embedding), target, **further)
    assert (after < before).all()
    torch.testing.assert_close((before - after).sum(), 0.05 * length, rtol=0.3, atol=0)


def test_save_and_load(make_head, tmp_path):
    head = make_head().eval()
    head.labelled_by = "OpenPose"
    features = make_features(head)
    head.save_pretrained(tmp_path / "full")
    assert {path.name for path in (tmp_path / "full").iterdir()} == {"head.json", "head.safetensors"}
    for loaded in (type(head).from_pretrained(tmp_path / "full"), load_head(tmp_path / "full")):
        assert type(loaded) is type(head) and not loaded.training and loaded.labelled_by == "OpenPose"
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(*features), head(*features))
        assert {k: v for k, v in loaded.hparams.items() if k != "val_timesteps"} == {
            k: v for k, v in head.hparams.items() if k != "val_timesteps"
        }
    head.save_pretrained(tmp_path / "half", half=True)
    halved = load_head(tmp_path / "half")
    assert next(halved.parameters()).dtype == torch.float32
    torch.testing.assert_close(halved(*features), head(*features), atol=0.02, rtol=0)
    half, full = ((tmp_path / kind / "head.safetensors").stat().st_size for kind in ("half", "full"))
    assert full - half == pytest.approx(2 * sum(tensor.numel() for tensor in head.state_dict().values()), abs=100)


def test_checkpoint_holds_plain_values_and_the_head_alone(make_head, tiny_pipeline, tmp_path):
    backbone = DiffusionBackbone(tiny_pipeline())
    head = make_head(tap_channels=backbone.tap_channels, time_embed_dim=backbone.time_embed_dim)
    head.attach_backbone(backbone)
    batches = DataLoader([make_batch(head, latent_side=8)], batch_size=None)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(head, batches, batches)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {name for name, _ in head.named_parameters()}
    plain = (int, float, str, bool, list, tuple, dict, type(None))
    assert all(isinstance(value, plain) for value in saved["hyper_parameters"].values())
    loaded = type(head).load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert loaded.backbone is None
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, head.get_parameter(name)), name
    assert set(trainer.callback_metrics) >= {f"val/loss_t{t}" for t in head.hparams.val_timesteps}


def test_folders_that_hold_no_such_head(make_head, tmp_path):
    head = make_head()
    with pytest.raises(FileNotFoundError, match="head.json and head.safetensors"):
        type(head).from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"head={re.escape(str(tmp_path))}: .*head.json"):
        load_head(tmp_path)
    head.save_pretrained(tmp_path)
    other = type("OtherHead", (type(head),), {})
    with pytest.raises(ValueError, match=f"OtherHead.* {type(head).__name__}"):
        other.from_pretrained(tmp_path)
    record = (tmp_path / "head.json").read_text()
    (tmp_path / "head.json").write_text(record.replace(type(head).__name__, "NoHead"))
    with pytest.raises(ValueError, match=r"\[.*Head.*\].*'NoHead'"):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text(record.replace('"projection_dim": 16', '"projection_dim": 32'))
    with pytest.raises(ValueError, match=r"head.safetensors: aggregation\..*expected .*, found "):
        load_head(tmp_path)
    (tmp_path / "head.json").write_text(record)
    (tmp_path / "head.safetensors").write_bytes((tmp_path / "head.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/head.safetensors: "):
        load_head(tmp_path)
    (tmp_path / "head.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="head.safetensors"):
        load_head(tmp_path)


def test_every_head_can_be_loaded_by_name(make_head):
    assert HEADS[type(make_head()).__name__] == type(make_head()).__module__
