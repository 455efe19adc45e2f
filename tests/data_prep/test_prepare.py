import json
import re
import sys
import time
from functools import partial
from threading import Thread

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import Encoder
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from data_prep.marionette.render import render
from data_prep.marionette.vocabulary import VOCABULARY
from data_prep.prepare import build, main
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.samples import DataError
from rg.data.shards import Manifest, read_shards

BAD = 5  # the image that cannot be read


@pytest.fixture
def model(tiny_pipeline, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "tiny_model"
    if not folder.is_dir():
        tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, model):
    """Forty images of 32 x 40 with skeletons as JSON; one image is damaged, one has no label."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(rng.integers(256, size=(32, 40, 3), dtype=np.uint8)).save(tmp_path / f"images/{number:02}.png")
        keypoints = np.concatenate([rng.uniform(0, 32, (1, 18, 2)), np.ones((1, 18, 1))], -1)
        (tmp_path / f"labels/{number:02}.json").write_text(json.dumps({"keypoints": keypoints.tolist()}))
    (tmp_path / f"images/{BAD:02}.png").write_bytes(b"no image")
    (tmp_path / "labels/12.json").unlink()
    shares = {"validation_share": 0.0, "test_share": 0.0}
    folder = {
        "_target_": "data_prep.sources.folders.FolderSource",
        "path": str(tmp_path / "images"),
        "resolution": 32,
    }
    return {
        "source": {**folder, **shares},
        "annotator": {"_target_": "data_prep.annotators.files.FileLabels", "path": str(tmp_path / "labels")},
        "backbone": {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": str(model)},
        "shard_size": 10,
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_what_was_asked_for(tmp_path, recipe, model):
    manifest = build(root=str(tmp_path / "out"), n=25, **recipe)
    folder = tmp_path / "out" / "train"
    assert sorted(path.name for path in folder.glob("*.*")) == [
        ".lock",
        "manifest.json",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    samples = read_shards(folder, autoencoder_id=DiffusionBackbone.from_pretrained(str(model)).autoencoder_id)
    assert samples.index.tolist() == manifest.indices() == [i for i in range(25) if i not in (BAD, 12)]
    assert manifest.kind == Manifest.read(folder).kind == "image"
    mean, std = DiffusionBackbone.from_pretrained(str(model)).encode(samples.decoded()[:3] / 127.5 - 1)
    torch.testing.assert_close(samples.latent[:3].float(), torch.cat([mean, std], 1), rtol=2e-3, atol=2e-3)
    image = np.array(Image.open(tmp_path / "images/04.png"))[:, 4:36]
    assert torch.equal(samples.decoded()[4], torch.from_numpy(image).permute(2, 0, 1))


def test_manifest_counts_and_names_everything(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=25, **recipe)
    manifest = json.loads((tmp_path / "out/train/manifest.json").read_text())
    assert manifest["samples"] == 23 and manifest["split"] == "train"
    assert set(manifest["skipped"]) == {"00000005", "00000012"}
    assert manifest["skipped"]["00000005"].startswith("05.png cannot be read")
    assert manifest["skipped"]["00000012"].startswith("12.png has no label")
    assert manifest["shards"]["shard-000002.tar"] == {"start": 20, "stop": 25, "samples": 5}
    assert manifest["settings"]["pictures"]["crop"] == "centre square"
    assert manifest["settings"]["pictures"]["resolution"] == 32
    assert manifest["settings"]["source"]["path"] == str(tmp_path / "images")
    assert len(manifest["autoencoder_id"]) == 16 and {"torch", "diffusers"} <= set(manifest["versions"])


def test_second_run_writes_nothing(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=25, **recipe)
    folder = tmp_path / "out/train"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("[!.]*")}
    build(root=str(tmp_path / "out"), n=25, **recipe)
    build(root=str(tmp_path / "out"), n=3, **recipe)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("[!.]*")}


@pytest.mark.slow
def test_extending_gives_the_bytes_of_the_whole_and_keeps_finished_shards(tmp_path, recipe):
    build(root=str(tmp_path / "whole"), n=None, **recipe)
    build(root=str(tmp_path / "parts"), n=13, **recipe)
    first = tmp_path / "parts/train/shard-000000.tar"
    written = first.stat().st_mtime_ns
    for n in (14, 40):
        build(root=str(tmp_path / "parts"), n=n, **recipe)
    assert first.stat().st_mtime_ns == written
    assert contents(tmp_path / "parts/train") == contents(tmp_path / "whole/train")


def test_shard_that_was_taken_away_is_made_again(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=30, **recipe)
    before = contents(tmp_path / "out/train")
    (tmp_path / "out/train/shard-000001.tar").unlink()
    build(root=str(tmp_path / "out"), n=30, **recipe)
    assert contents(tmp_path / "out/train") == before


def test_an_image_that_got_its_label_is_not_skipped_when_its_shard_is_made_again(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=20, **recipe)
    (tmp_path / "labels/12.json").write_bytes((tmp_path / "labels/13.json").read_bytes())
    (tmp_path / "out/train/shard-000001.tar").unlink()
    manifest = build(root=str(tmp_path / "out"), n=20, **recipe)
    assert manifest.indices() == [i for i in range(20) if i != BAD]
    assert read_shards(tmp_path / "out/train").index.tolist() == manifest.indices()


def test_killed_while_writing_then_continued(tmp_path, recipe, kill_when):
    recipe["shard_size"] = 4
    build(root=str(tmp_path / "whole"), n=40, **recipe)
    arguments = {"root": str(tmp_path / "killed"), "n": 40, **recipe}
    folder = tmp_path / "killed/train"
    for name in ("shard-000000.tar", "shard-000004.tar"):
        kill_when(lambda name=name: any(folder.glob(f"{name}.*.part")), build, **arguments)
        if (folder / "manifest.json").is_file():
            found = Manifest.read(folder).indices()
            assert len(found) < 38 and read_shards(folder).index.tolist() == found
    build(**arguments)
    assert contents(folder) == contents(tmp_path / "whole/train")


def test_the_second_of_two_waits_and_says_so(tmp_path, recipe, caplog):
    caplog.set_level("INFO", "data_prep")
    folder = tmp_path / "out/train"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        second = Thread(target=partial(build, root=str(tmp_path / "out"), n=4, **recipe))
        second.start()
        while not any("waiting" in text and str(folder) in text for text in caplog.messages):
            assert second.is_alive()
            time.sleep(0.01)
        assert {path.name for path in folder.iterdir()} == {".lock"}
    second.join()
    assert read_shards(folder).index.tolist() == [0, 1, 2, 3]


def test_killed_between_the_shard_and_the_manifest(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=14, **recipe)
    manifest = Manifest.read(tmp_path / "out/train")
    build(root=str(tmp_path / "out"), n=20, **recipe)
    whole = contents(tmp_path / "out/train")
    manifest.write(tmp_path / "out/train")
    assert read_shards(tmp_path / "out/train").index.tolist() == manifest.indices()
    build(root=str(tmp_path / "out"), n=20, **recipe)
    assert contents(tmp_path / "out/train") == whole


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard_size": 20}, "shard_size = 10.* 20"),
        ({"encode_batch": 4}, "encode_batch = 50.* 4"),
        ({"source": {"seed": 1}}, "source.seed = None.* 1"),
        ({"annotator": {"line_width": 3.0}}, "annotator.line_width = None.* 3.0"),
    ],
)
def test_other_settings_are_refused_before_any_work(tmp_path, recipe, change, words):
    build(root=str(tmp_path / "out"), n=10, **recipe)
    before = contents(tmp_path / "out/train")
    changed = OmegaConf.to_container(OmegaConf.merge(recipe, change))
    with pytest.raises(DataError, match=f"out/train .*{words}"):
        build(root=str(tmp_path / "out"), n=20, **changed)
    assert contents(tmp_path / "out/train") == before


def test_folders_from_before_the_setting_go_on(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=10, **recipe)
    build(root=str(tmp_path / "whole"), n=20, **recipe)
    manifest = Manifest.read(tmp_path / "out/train")
    del manifest.settings["encode_batch"]
    manifest.write(tmp_path / "out/train")
    with pytest.raises(DataError, match=r"encode_batch = 50.* 4"):
        build(root=str(tmp_path / "out"), n=20, encode_batch=4, **recipe)
    build(root=str(tmp_path / "out"), n=20, **recipe)
    assert contents(tmp_path / "out/train") == contents(tmp_path / "whole/train")


@pytest.mark.parametrize("batch", [1, 4])
def test_the_autoencoder_gets_the_asked_for_number_of_images(tmp_path, recipe, batch):
    sizes = set()

    def note(module, given):
        if isinstance(module, Encoder):
            sizes.add(len(given[0]))

    watch = register_module_forward_pre_hook(note)
    try:
        build(root=str(tmp_path / "out"), n=10, encode_batch=batch, **recipe)
    finally:
        watch.remove()
    assert sizes == {batch} and Manifest.read(tmp_path / "out/train").settings["encode_batch"] == batch
    found = read_shards(tmp_path / "out/train")
    backbone = DiffusionBackbone.from_pretrained(recipe["backbone"]["path"])
    latent = torch.cat(backbone.encode(found[3]["image"][None]), 1)[0]
    torch.testing.assert_close(found.latent[3].float(), latent, rtol=1e-2, atol=1e-3)


def test_another_autoencoder_is_refused(tmp_path, recipe, tiny_pipeline):
    build(root=str(tmp_path / "out"), n=10, **recipe)
    tiny_pipeline(seed=1).save_pretrained(tmp_path / "other")
    recipe["backbone"]["path"] = str(tmp_path / "other")
    with pytest.raises(DataError, match=r"autoencoder_id = '\w{16}'.*'\w{16}'"):
        build(root=str(tmp_path / "out"), n=10, **recipe)


def test_more_images_in_the_folder_are_refused(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=10, **recipe)
    Image.new("RGB", (32, 32)).save(tmp_path / "images/00a.png")
    with pytest.raises(DataError, match="file_names"):
        build(root=str(tmp_path / "out"), n=20, **recipe)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "dev"}, "split: .*train, val, search, test.*'dev'"),
        ({"n": 41}, "n: .*1 to 40.*train.* 41"),
        ({"n": 0}, "n: .*1 to 40.* 0$"),
        ({"encode_batch": 0}, "encode_batch: .*1.* 0$"),
        ({"split": "val"}, "split=val: .* 1 .* 0.*pictures.validation_share"),
    ],
)
def test_bad_requests_leave_nothing_behind(tmp_path, recipe, change, words):
    with pytest.raises(DataError, match=words):
        build(root=str(tmp_path / "out"), **recipe | change)
    assert not (tmp_path / "out").exists()


def test_resolution_must_be_the_backbones(tmp_path, recipe):
    recipe["source"]["resolution"] = 64
    with pytest.raises(DataError, match=r"source.resolution: .*\(32, 32\).* 64"):
        build(root=str(tmp_path / "out"), **recipe)


def test_recipe_of_the_embedded_world(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        builder = instantiate(compose("prepare", ["data=pose"]).data.builder)
    with pytest.raises(DataError, match="n: .*endless.*n="):
        builder(root=str(tmp_path))
    builder(root=str(tmp_path), split="val", n=3)
    samples = read_shards(tmp_path / "val")
    assert samples.decoded().shape == samples.decoded("label").shape == (3, 3, 64, 64)
    assert samples.keypoints.shape == (3, 1, 18, 3) and samples.latent.shape == (3, 8, 16, 16)
    assert all(words.startswith("a person ") and set(words.split()) <= set(VOCABULARY) for words in samples.prompt)


@pytest.mark.parametrize("control", ["depth", "edge"])
def test_depth_and_edges_of_the_embedded_world(tmp_path, root, monkeypatch, control):
    run_command(monkeypatch, root, f"data={control}", f"data.builder.root={tmp_path}", "split=val", "n=3")
    samples = read_shards(tmp_path / "val")
    label = samples.decoded("label")
    assert label.shape == (3, 3, 64, 64) and samples.latent.shape == (3, 8, 16, 16)
    stills = render([(0, 1, index) for index in range(3)])
    assert torch.equal(samples.decoded(), stills.image)
    if control == "depth":
        wanted = stills.depth / stills.depth.amax((1, 2), keepdim=True)
        torch.testing.assert_close(label[:, 2] / 255, wanted, rtol=0, atol=0.5 / 255 + 1e-6)
    else:
        assert set(label.unique().tolist()) == {0, 255} and (label[:, 1][stills.edges] == 255).all()


@pytest.mark.parametrize(
    ("label", "words", "skipped"),
    [
        (
            "depth",
            ["pictures.labels={0}/labels"],
            {
                "00000001": "1.png cannot be read",
                "00000002": r"{0}/labels/2.png: .*\(64, 64\).*\(64, 63\)",
                "00000003": "3.png .*pictures.labels={0}/labels: .*3.png.* none",
                "00000004": "4.png .*{0}/labels/4.png",
            },
        ),
        (
            "edge",
            [],
            {"00000001": "1.png cannot be read", "00000005": "5.png .*no edge"},
        ),
    ],
)
def test_depth_and_edges_of_ones_own_images(tmp_path, root, monkeypatch, capsys, label, words, skipped):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(7):
        image = rng.integers(256, size=(64, 64, 3), dtype=np.uint8) * (number != 5)
        Image.fromarray(image).save(tmp_path / f"images/{number}.png")
        Image.fromarray(image[:, : 63 if number == 2 else 64, 0]).save(tmp_path / f"labels/{number}.png")
    (tmp_path / "images/1.png").write_bytes(b"no image")
    (tmp_path / "labels/3.png").rename(tmp_path / "labels/3.json")
    (tmp_path / "labels/4.png").write_bytes(b"no image")
    words = [word.format(tmp_path) for word in words]
    shares = [f"pictures.{share}=0" for share in ("validation_share", "test_share")]
    out = ["pictures=folder", f"data.builder.root={tmp_path}/out", f"pictures.path={tmp_path}/images"]
    run_command(monkeypatch, root, f"data={label}", *out, *shares, *words)
    assert f"{7 - len(skipped)} samples, {len(skipped)} skipped (manifest.json)" in capsys.readouterr().out
    named = json.loads((tmp_path / "out/train/manifest.json").read_text())["skipped"]
    assert named.keys() == skipped.keys()
    assert all(re.match(reason.format(tmp_path), named[key]) for key, reason in skipped.items()), named
    labels = read_shards(tmp_path / "out/train").decoded("label")
    if label == "depth":
        own = np.asarray(Image.open(tmp_path / "labels/6.png"))
        assert torch.equal(labels[-1], torch.tensor(own).expand(3, -1, -1))
    else:
        assert labels.amax((1, 2, 3)).eq(255).all()


def run_command(monkeypatch, root, *words):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["prepare", *words])
    main()


FOLDERS = ["pictures.path={0}/images", "pictures.labels={0}/labels", "data.builder.root={0}/out"]


@pytest.mark.parametrize(
    ("files", "words", "found"),
    [
        ([], [], r"pictures\.path=data/marionette_images: .*folder.* none"),
        ([], FOLDERS, r"pictures\.path={0}/images: .*folder.* none"),
        (["images/notes.md"], FOLDERS, r"pictures\.path={0}/images: .*images .*\.png.* none"),
        (
            ["images/notes.md"],
            [*FOLDERS, "data=appearance"],
            r"pictures\.path={0}/images: .*images .*none",
        ),
        (["images/0.png"], FOLDERS[:1], r"body_pose_model\.pth: .*hub.*pictures\.pose\.weights=.*pictures\.labels="),
        (
            ["images/0.png"],
            [*FOLDERS[:1], "pictures/pose=movenet", "pictures.pose.folder={0}"],
            r"pictures\.pose\.folder={0}: .*movenet-multipose\.json.* none",
        ),
        (["images/0.png"], FOLDERS, r"pictures\.labels={0}/labels: .*folder.* none"),
        (
            ["images/0/0.png"],
            [*FOLDERS, "data=correspondence", "pictures.masks={0}/masks"],
            r"pictures\.masks={0}/masks: .*folder.* none",
        ),
        (
            ["images/0.png", "labels/1.png"],
            FOLDERS,
            r"pictures\.labels={0}/labels: .*0.png.* 0.json.* none",
        ),
        (
            ["images/0.png", "labels/0.json"],
            [*FOLDERS, "data=depth"],
            r"pictures\.labels={0}/labels: .*0.png.* none",
        ),
    ],
)
def test_ones_own_folders_that_cannot_be_used_are_one_line(tmp_path, root, monkeypatch, files, words, found):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / file, "png")
    shares = ["pictures.validation_share=0", "pictures.test_share=0"]
    with pytest.raises(SystemExit, match=rf"^error: .*{found.format(re.escape(str(tmp_path)))}[^\n]*$"):
        run_command(monkeypatch, root, "pictures=folder", *shares, *(word.format(tmp_path) for word in words))


def test_the_command_names_the_first_image_that_lacks_a_label(tmp_path, root, monkeypatch, capsys):
    for name in ("images/0.png", "images/1.png", "labels/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    shares = ["pictures.validation_share=0", "pictures.test_share=0"]
    run_command(monkeypatch, root, "pictures=folder", *shares, *(word.format(tmp_path) for word in FOLDERS))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "skipped" in line)
    assert line.startswith(f"{tmp_path}/out/train: 1 samples, 1 skipped (manifest.json)")
    assert f"0.png has no label: pictures.labels={tmp_path}/labels" in line and "0.json" in line


def test_command(tmp_path, root, monkeypatch, capsys):
    before = sorted(root.glob("*"))
    words = "data=pose", f"data.builder.root={tmp_path}", "split=test"
    run_command(monkeypatch, root, *words, "n=2")
    assert f"{tmp_path}/test: 2 samples, 0 skipped (manifest.json)" in capsys.readouterr().out
    assert len(read_shards(tmp_path / "test")) == 2
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}/test .*source.seed = 0.* 1"):
        run_command(monkeypatch, root, *words, "n=2", "pictures.seed=1")
    with pytest.raises(SystemExit, match=r"^error: n: .*endless.*n="):
        run_command(monkeypatch, root, *words)
    assert sorted(root.glob("*")) == before, "Hydra leaves no files"


def test_an_endless_source_goes_on_where_samples_are_skipped(tmp_path, model):
    source = {
        "_target_": "data_prep.sources.marionette.MarionettePairs",
        "seed": 0,
        "resolution": 32,
        "kinds": {"one": 1.0},
    }
    annotator = {"_target_": "data_prep.annotators.rendered.ExactTracks", "min_points": 40}
    backbone = {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": str(model)}
    recipe = {"source": {**source, "points": 64, "clips": False}, "annotator": annotator, "backbone": backbone}
    manifest = build(root=str(tmp_path / "pairs"), n=6, shard_size=4, **recipe)
    assert manifest.skipped, "else this shows nothing"
    assert len(manifest.indices()) == 6 and len(read_shards(tmp_path / "pairs/train", 6)) == 6
    before = contents(tmp_path / "pairs/train")
    build(root=str(tmp_path / "pairs"), n=6, shard_size=4, **recipe)
    assert contents(tmp_path / "pairs/train") == before
    # Nothing has as many points as this: it ends all the same, and says what is missing.
    recipe["annotator"] = {**annotator, "min_points": 65}
    manifest = build(root=str(tmp_path / "none"), n=2, shard_size=4, **recipe)
    assert manifest.indices() == [] and len(manifest.skipped) == 4


def test_labels_of_ones_own_stand_for_those_of_a_network(tmp_path, recipe):
    """Nothing of the network is looked for, and the manifest is that of a recipe that knows of none."""
    plain = build(root=str(tmp_path / "plain"), n=5, **recipe)
    network = {"_target_": "data_prep.annotators.pose.movenet.MoveNet", "folder": str(tmp_path / "nowhere")}
    labels, recipe["annotator"] = recipe["annotator"], network
    assert build(root=str(tmp_path / "both"), n=5, labels=labels, **recipe) == plain
    assert contents(tmp_path / "both/train") == contents(tmp_path / "plain/train")
    with pytest.raises(InstantiationException, match="pictures.pose.folder=.*nowhere"):
        build(root=str(tmp_path / "none"), n=5, labels={**labels, "path": None}, **recipe)
    assert not (tmp_path / "none").exists()


def test_a_network_is_not_asked_for_where_all_labels_are_made(tmp_path, recipe):
    build(root=str(tmp_path / "out"), n=5, **recipe)
    labels = tmp_path / "labels"
    labels.rename(tmp_path / "moved")
    assert len(build(root=str(tmp_path / "out"), n=5, **recipe).indices()) == 5
    with pytest.raises(InstantiationException, match="pictures.labels=.*labels"):
        build(root=str(tmp_path / "out"), n=6, **recipe)
