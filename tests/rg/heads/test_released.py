import copy
import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hydra import compose, initialize_config_dir

from rg import sample
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import choose_head
from rg.heads import load_head, released
from rg.heads.appearance import AppearanceHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.spatial import SpatialHead
from tests import families

CONF = Path(__file__).parents[3] / "conf"
DIMS, SIZES, TIME = [8, 128, 4], [2, 4, 6], 6  # the second tap is as wide as the projection: no shortcut
COLORS = {"control_range": (-0.5, 0.5), "sparse_loss": True}


def make_record(output=None, *, sequential=False, dims=DIMS, time=TIME, projection=128, seed=0, **config):
    """A file of the authors' layout, written from its description alone; output: channels of the output head."""
    generator, inner, width = torch.Generator().manual_seed(seed), "0." if sequential else "", projection // 4

    def draw(*shape):
        return torch.randn(*shape, generator=generator) / max(1, torch.Size(shape).numel() // shape[0]) ** 0.5

    weights = {"mixing_weights": draw(len(dims))}
    for i, channels in enumerate(dims):
        layers = {"conv1": (width, channels, 1, 1), "conv2": (width, width, 3, 3), "conv3": (projection, width, 1, 1)}
        if channels != projection:
            layers["shortcut"] = (projection, channels, 1, 1)
        for layer, shape in layers.items():
            weights[f"bottleneck_layers.{i}.{inner}{layer}.weight"] = draw(*shape)
            for part, centre in (("weight", 1.0), ("bias", 0.0)):
                weights[f"bottleneck_layers.{i}.{inner}{layer}.norm.{part}"] = draw(shape[0]) * 0.3 + centre
        weights[f"bottleneck_layers.{i}.{inner}emb_layers.weight"] = draw(width, time)
        weights[f"bottleneck_layers.{i}.{inner}emb_layers.bias"] = draw(width)
    for number, shape in (
        {0: (128, projection, 3, 3), 2: (32, 128, 3, 3), 4: (output, 32, 1, 1)}.items() if output else ()
    ):
        weights |= {f"output_head.{number}.weight": draw(*shape), f"output_head.{number}.bias": draw(shape[0])}
    aggregation = {"use_output_head": output is not None, "bottleneck_sequential": sequential}
    if output is not None:
        aggregation["output_head_channels"] = output
    if output == 18:
        aggregation["output_head_act"] = False
    plain = {
        "projection_dim": projection,
        "dims": list(dims),
        "save_timestep": [0],
        "num_timesteps": 1000,
        "output_resolution": 64,
        "aggregation_kwargs": aggregation,
        "dataset_args": COLORS if output == 3 else {},
    }
    return {"config": {**plain, **config}, "aggregation_network": weights}


def make_inputs(seed=1):
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(2, c, s, s, generator=generator) for c, s in zip(DIMS, SIZES, strict=True)]
    return maps, torch.randn(2, TIME, generator=generator)


@pytest.fixture
def load(tmp_path):
    """Writes a record and loads it: `load(record, task="appearance")`."""

    def write_and_load(record, **arguments):
        torch.save(record, tmp_path / "head.pt")
        return released.load(tmp_path / "head.pt", **arguments)

    return write_and_load


@pytest.mark.parametrize("time", ["emb", "noemb"])
@pytest.mark.parametrize(
    ("kind", "task"), [("spatial", None), ("relative", "appearance"), ("relative", "correspondence")]
)
def test_parity_with_the_authors_heads(shared, tmp_path, kind, task, time):
    head = released.load(shared / f"fixtures/tiny_{kind}.pt", task=task)
    case = torch.load(shared / f"fixtures/tiny_{kind}_io.pt", weights_only=True)
    readout = head(case["native"], case["emb"] if time == "emb" else None)
    torch.testing.assert_close(readout, case[f"out_{time}"], atol=2e-5, rtol=0)
    head.check_taps([64] * 6 + [32] * 3 + [16] * 3, 1280)
    head.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"head.json", "head.safetensors"}
    again = load_head(tmp_path)
    assert type(again) is type(head)
    assert torch.equal(again(case["native"], case["emb"]), head(case["native"], case["emb"]))


@pytest.mark.parametrize("name", ["pose", "depth"])
def test_energy_parity_with_the_authors(shared, load, name):
    case = torch.load(shared / "fixtures/operators.pt", weights_only=True)[f"guide_spatial_{name}"]
    head = load(make_record(3, dataset_args={"control_range": case["control_range"], "sparse_loss": name == "pose"}))
    obs = case["obs"].clone().requires_grad_()
    span = case["latents_scale"][1] - case["latents_scale"][0]
    energy = head.energy(obs.permute(0, 3, 1, 2), case["control"][None, :, ::2, ::2])
    energy = energy.sum() * (span / head.readout_span) ** 2
    torch.testing.assert_close(energy, case["loss"], rtol=1e-5, atol=0)
    (slope,) = torch.autograd.grad(energy, obs)
    torch.testing.assert_close(slope, case["grad"], rtol=1e-4, atol=1e-4 * case["grad"].abs().max())


@pytest.mark.parametrize("control_range", [[-0.5, 0.5], (-0.5, 0.5), (-1, 1)])
def test_an_rgb_file(load, tmp_path, control_range):
    record = make_record(3, dataset_args={"control_range": control_range, "sparse_loss": True}, prompt="")
    head = load({**record, "step": 5000, "optimizer_state_dict": {"state": {}}})
    assert type(head) is SpatialHead and head.hparams.variant == "rgb" and not head.training
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert head.readout_span == control_range[1] - control_range[0]
    assert (head.hparams.sparse, head.hparams.sparse_energy) == (True, False)
    assert head.time_index(torch.tensor([1, 991])).tolist() == [999, 9], "as in their training"
    maps, embedding = make_inputs()
    readout = head(maps, embedding)
    assert readout.shape == (2, 3, 6, 6) and readout.abs().max() < 1
    assert not torch.allclose(readout, head(maps, None), atol=1e-3)
    head.save_pretrained(tmp_path / "saved")
    again = load_head(tmp_path / "saved")
    assert torch.equal(again(maps, embedding), readout)
    assert again.readout_span == head.readout_span and again.hparams.time_convention == "mirrored"


def test_a_keypoint_file(load):
    record = make_record(18)
    head = load(record)
    assert (head.hparams.variant, head.hparams.sigma, head.readout_span) == ("keypoints", 4.0, 1.0)
    maps, embedding = make_inputs()
    last = record["aggregation_network"]["output_head.4.bias"]
    last += 100
    torch.testing.assert_close(load(record)(maps, embedding), head(maps, embedding) + 100)  # linear


@pytest.mark.parametrize(("dims", "output", "parameters"), [
    ([1280] * 6 + [640] * 3 + [320] * 3, 3, 8_484_751), ([1280] * 6 + [640] * 3 + [320] * 3, None, 8_005_260),
    ([1280] * 3 + [640] * 3 + [320] * 3, 3, 5_907_436), ([1280] * 3 + [640] * 3 + [320] * 3, None, 5_427_945),
])  # fmt: skip
def test_files_of_the_released_sizes(load, dims, output, parameters):
    head = load(make_record(output, dims=dims, time=1280, projection=384), task=None if output else "appearance")
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters
    head.check_taps(dims, 1280)


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_names_decide_the_layout(load, flag):
    maps, embedding = make_inputs()
    plain, older = make_record(3), make_record(3, sequential=True)
    for record in (plain, older):
        record["config"]["aggregation_kwargs"]["bottleneck_sequential"] = flag
        if flag is None:
            del record["config"]["aggregation_kwargs"]["bottleneck_sequential"]
    head, same = load(plain), load(older)
    assert (head.hparams.time_convention, same.hparams.time_convention) == ("mirrored", "none")
    assert same.time_index(torch.tensor([1])) is None
    assert torch.equal(same(maps, None), head(maps, None))
    with pytest.raises(ValueError, match="time_convention: the layout of this file ignores time, got 'mirrored'"):
        load(older, time_convention="mirrored")


@pytest.mark.parametrize(("task", "kind", "convention"), [
    ("appearance", AppearanceHead, "mirrored"), ("correspondence", CorrespondenceHead, "none"),
])  # fmt: skip
def test_a_file_without_output_head_needs_its_task(load, task, kind, convention):
    head = load(make_record(), task=task)
    assert type(head) is kind and head.hparams.time_convention == convention
    assert head(*make_inputs()).shape == (2, 128, 6, 6)
    assert load(make_record(), task=task, time_convention="direct").hparams.time_convention == "direct"
    for wrong in (None, "pose"):
        with pytest.raises(ValueError, match=rf"task: expected one of \['appearance', 'correspondence'\].*{wrong!r}"):
            load(make_record(), task=wrong)
    with pytest.raises(ValueError, match=f"task: expected none for a file with an output head, got '{task}'"):
        load(make_record(3), task=task)


def test_the_authors_correspondence_keeps_ghosts_away(load):
    head = load(make_record(), task="correspondence")
    assert head.hparams.repulsion == 0.5 and head.readout_span is None


def without(record, key):
    record = copy.deepcopy(record)
    *path, last = key.split("/")
    inner = record
    for part in path:
        inner = inner[part]
    del inner[last]
    return record


def replaced(record, key, value):
    record = copy.deepcopy(record)
    *path, last = key.split("/")
    inner = record
    for part in path:
        inner = inner[part]
    inner[last] = value
    return record


@pytest.mark.parametrize("key", [
    "aggregation_network", "config", "config/dims", "config/projection_dim", "config/save_timestep",
    "config/aggregation_kwargs", "config/aggregation_kwargs/use_output_head",
    "config/aggregation_kwargs/output_head_channels", "config/dataset_args", "config/dataset_args/control_range",
    "config/dataset_args/sparse_loss",
])  # fmt: skip
def test_a_missing_entry_is_named(load, key):
    with pytest.raises(ValueError, match=rf"released=.*head\.pt: expected an entry {key.replace('/', '.')}"):
        load(without(make_record(3), key))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("config/dims", 3, "config.dims: expected list or tuple, found 3"),
        ("config/dims", [8, "128", 4], r"config.dims: expected a list of int, found \[8, '128', 4\]"),
        ("config/dims", [8, -128, 4], "negative dimension"),
        ("config/dims", [8, 128], "no place for .*bottleneck_layers.2.conv1.norm.bias"),
        ("config/dims", [8, 128, 4, 4], "expected also .*bottleneck_layers.3.conv1.norm.bias"),
        ("config/dims", [8, 64, 4], "expected also .*bottleneck_layers.1.shortcut.weight"),
        (
            "config/dims",
            [9, 128, 4],
            r"layers.0.conv1.weight of shape \(32, 9, 1, 1\), found torch.float32 \(32, 8, 1, 1",
        ),
        ("config/projection_dim", 100, "norm_groups: expected a divisor"),
        ("config/projection_dim", 256, "expected also .*bottleneck_layers.1.shortcut.weight"),
        ("config/save_timestep", [0, 1], r"config.save_timestep: expected \[0\], found \[0, 1\]"),
        ("config/aggregation_kwargs/output_head_channels", 4, r"expected output_head_channels 3 .* found \(4, True\)"),
        ("config/aggregation_kwargs/output_head_act", False, r"found \(3, False\)"),
        ("config/aggregation_kwargs/use_output_head", 1, "use_output_head: expected bool, found 1"),
        ("config/dataset_args/control_range", (0.5, -0.5), r"control_range: expected \(low, high\), found"),
        ("config/dataset_args/control_range", (0.5,), r"control_range: expected \(low, high\), found"),
        ("config/dataset_args/control_range", None, "control_range: expected list or tuple, found None"),
        ("aggregation_network/mixing_weights", torch.ones(4), r"mixing_weights of shape \(3,\), found .* \(4,\)"),
        ("aggregation_network/output_head.4.bias", torch.ones(3, dtype=torch.int64), "found torch.int64"),
        ("aggregation_network/output_head.4.bias", [0.0, 0.0, 0.0], r"another thing at \['output_head.4.bias'\]"),
        ("aggregation_network/7", torch.ones(1), r"no place for \['7'\]"),
        ("aggregation_network/bottleneck_layers.0.emb_layers.weight", torch.ones(32), r"found torch.float32 \(32,\)"),
        ("aggregation_network/bottleneck_layers.1.emb_layers.weight", torch.ones(32, 7), r"\(32, 6\), found"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(load, key, value, words):
    with pytest.raises(ValueError, match=rf"released=.*head\.pt: .*{words}"):
        load(replaced(make_record(3), key, value))


def test_missing_and_leftover_weights_are_named(load):
    record = make_record(3)
    for name in record["aggregation_network"]:
        with pytest.raises(ValueError, match="aggregation_network: expected also") as error:
            load(without(record, f"aggregation_network/{name}"))
        assert name in str(error.value)
    # One layer under the older prefix among layers under the newer one.
    mixed = replaced(record, "aggregation_network/bottleneck_layers.1.0.conv1.weight", torch.zeros(32, 128, 1, 1))
    with pytest.raises(ValueError, match="aggregation_network: expected also .*bottleneck_layers.0.0.conv1.norm.bias"):
        load(mixed)
    with pytest.raises(ValueError, match="aggregation_network: no place for .*shortcut"):
        load(replaced(record, "aggregation_network/bottleneck_layers.1.shortcut.weight", torch.zeros(128, 128, 1, 1)))
    keypoints = make_record(18)
    keypoints["config"]["aggregation_kwargs"] = {"use_output_head": False}
    with pytest.raises(ValueError, match="no place for .*output_head.0.bias"):
        load(keypoints, task="appearance")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_plain_values_are_refused_and_not_run(load, tmp_path):
    record = make_record(3)
    with pytest.raises(
        ValueError, match=r"released=.*head\.pt: expected a file of torch.save with plain values, found"
    ):
        load({**record, "step": Trap(tmp_path / "sprung")})
    assert not (tmp_path / "sprung").exists()
    torch.save(record, tmp_path / "whole.pt")
    half = (tmp_path / "whole.pt").read_bytes()[: (tmp_path / "whole.pt").stat().st_size // 2]
    for name, content in {"half.pt": half, "empty.pt": b"", "page.pt": b"<html>not found</html>"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError, match=f"{name}: expected a file of torch.save with plain values, found"
        ) as error:
            released.load(tmp_path / name)
        assert "\n" not in str(error.value)
    for other in ([1, 2], record["aggregation_network"]):
        with pytest.raises(ValueError, match="expected an entry aggregation_network"):
            load(other)


def test_unknown_names_and_paths_are_named(tmp_path):
    words = r"released=.*dept.*: expected one of \['appearance', .*'pose_keypoint'\] or a .pt file, found no such file"
    for source in ("dept", tmp_path / "dept.pt"):
        with pytest.raises(FileNotFoundError, match=words):
            released.load(source, family="sd15")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and how to put a file into it as a download would."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(file, record):
        folder = tmp_path / "hub" / f"models--{released.REPOSITORY.replace('/', '--')}"
        path = folder / "snapshots" / ("0" * 40) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(record, path)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("0" * 40)
        return path

    return put


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("name", released.FILES)
def test_a_name_that_cannot_be_downloaded(cache, name, family):
    file = rf"(weights|readout_pose)/readout_{family.replace('sd15', 'sdv15')}_\w+\.pt"
    words = rf"released={name}: expected https://\S+/{file} in the cache .*offline mode is enabled.* by hand"
    with pytest.raises(FileNotFoundError, match=words):
        released.load(name, family=family)


@pytest.mark.parametrize("family", [None, "marionette", "sdv15"])
def test_families_without_released_heads(family):
    with pytest.raises(ValueError, match=rf"released=pose: expected .* family of \['sd15', 'sdxl'\], got {family!r}"):
        released.load("pose", family=family)


def test_names_find_their_files(cache):
    for number, (name, pattern) in enumerate(released.FILES.items()):
        file = pattern.format("sdv15")
        path = cache(file, make_record(3, seed=number))
        assert released.download(name, "sd15", {file: hashlib.sha256(path.read_bytes()).hexdigest()}) == path


def test_names_whose_sha256_is_unknown_load(cache):
    for family, prefix in released.FAMILIES.items():
        for number, (name, pattern) in enumerate(released.FILES.items()):
            if (file := pattern.format(prefix)) not in released.SHA256:
                record = make_record(None if name in released.RELATIVE else 3, seed=number)
                cache(file, record)
                head = released.load(name, family=family)
                assert torch.equal(head.aggregation.mixing_weights, record["aggregation_network"]["mixing_weights"])
    assert type(released.load("appearance", family="sd15")) is AppearanceHead
    assert type(released.load("correspondence", family="sd15")) is CorrespondenceHead


def test_a_file_with_another_sha256_is_refused(cache):
    path = cache("weights/readout_sdv15_spatial_pose.pt", make_record(3))
    with pytest.raises(ValueError, match=rf"released=pose: expected SHA256 3cb20046\w+, found \w+; delete {path}"):
        released.load("pose", family="sd15")


def test_a_file_of_unknown_sha256_is_said_to_be_one(cache, caplog):
    path = cache("weights/readout_sdxl_spatial_pose.pt", make_record(3))
    released.load("pose", family="sdxl")
    assert "no SHA256 is known" in caplog.text
    assert hashlib.sha256(path.read_bytes()).hexdigest() in caplog.text


def test_known_sha256s_are_of_known_files():
    files = {file.format(prefix) for file in released.FILES.values() for prefix in ("sdv15", "sdxl")}
    assert released.SHA256.keys() <= files
    assert all(len(bytes.fromhex(digest)) == 32 for digest in released.SHA256.values())


def compose_sample(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("sample", ["+experiment=pose_control", "run_dir=none", *overrides])


def test_a_head_is_for_the_family_that_its_file_names(load):
    heads = [load(make_record(3, model_id=name)) for name in ("runwayml/stable-diffusion-v1-5", "my/finetune")]
    for head in heads:
        head.check_taps(DIMS, TIME, 768)
    with pytest.raises(ValueError, match="another model family with the same taps: .* width 768, .* have 1024"):
        heads[0].check_taps(DIMS, TIME, 1024)
    heads[1].check_taps(DIMS, TIME, 1024)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_command_takes_a_released_head_in_another_world(cache, tmp_path, tokenizer, family):
    pipe = families.build(family, tokenizer)
    pipe.save_pretrained(tmp_path / "model")
    backbone = DiffusionBackbone(pipe)
    record = make_record(3, dims=backbone.tap_channels, time=backbone.time_embed_dim)
    file = released.FILES["pose"].format(released.FAMILIES[family])
    path = cache(file, record)
    known = file in released.SHA256  # then the name refuses a file of other bytes
    control = {"size": [32, 32], "keypoints": [[[k, 31 - k, 1] for k in range(18)]]}
    (tmp_path / "pose.json").write_text(json.dumps(control))
    world = [f"world={family}", f"world.backbone.path={tmp_path / 'model'}", "world.backbone.precision=float32"]
    small = ["world.backbone.variant=null", "images=2", "sampling.num_inference_steps=2", "guidance=released"]
    overrides = [f"head.released={path if known else 'pose'}", f"control={tmp_path / 'pose.json'}", *world, *small]
    images = sample.sample(compose_sample(*overrides), tmp_path / "run")
    assert images.shape == (2, 3, 32, 32) and (tmp_path / "run" / "grid.png").is_file()


@pytest.mark.slow
def test_the_command_takes_a_released_head(tmp_path, root):
    backbone = DiffusionBackbone.from_pretrained("marionette", device="cpu")
    record = make_record(3, dims=backbone.tap_channels, time=backbone.time_embed_dim)
    torch.save(record, tmp_path / "head.pt")
    side = backbone.resolution[0]
    control = {"size": [side, side], "keypoints": [[[2.0 * k, 3.0 * k, 1] for k in range(18)]]}
    (tmp_path / "pose.json").write_text(json.dumps(control))
    small = ["images=1", "sampling.num_inference_steps=2", f"control={tmp_path / 'pose.json'}", "guidance=released"]
    images = sample.sample(compose_sample(f"head.released={tmp_path / 'head.pt'}", *small), tmp_path / "run")
    assert images.shape == (1, 3, *backbone.resolution) and (tmp_path / "run" / "grid.png").is_file()
    torch.save(make_record(3), tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"was made for a backbone with tap channels \[8, 128, 4\]"):
        sample.sample(compose_sample(f"head.released={tmp_path / 'other.pt'}", *small), tmp_path / "run")


def test_path_and_released_choose_a_head(cache, tmp_path):
    cache("weights/readout_sdxl_spatial_edge.pt", make_record(3))
    config = compose_sample()
    assert choose_head(config.head, "sdxl").hparams.variant == "keypoints"
    config = compose_sample("head.released=edge")
    assert choose_head(config.head, "sdxl").hparams.tap_channels == DIMS
    with pytest.raises(ValueError, match="got 'marionette'"):
        choose_head(config.head, config.world.family)
