"""The whole job at tiny size, by the commands that a user types."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from experiments.quality.ship import ship

pytestmark = pytest.mark.slow

TINY = ["images=2", "sampling.num_inference_steps=4"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("end_to_end")


def run(place: Path, root: Path, module: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` in an empty folder, with the repository on the path."""
    command = [sys.executable, "-m", module, *overrides]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(place)}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def head(place: Path, root: Path) -> Path:
    small = ["data.size=8", "data.val_size=2", "data.batch_size=4", "data.epoch_batches=2", "trainer.max_steps=2"]
    done = run(place, root, "rg.train", "+experiment=pose_100", *small, "trainer.check_val_every_n_epoch=1")
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "outputs" / "pose_100" / "latest" / "head"


def test_training_leaves_what_it_promises(head: Path):
    run_dir = head.parent
    assert (head / "head.safetensors").is_file() and (run_dir / "checkpoints" / "last.ckpt").is_file()
    assert {path.stem.split("-")[0] for path in (run_dir / "images").iterdir()} == {"readouts", "mixing_weights"}
    header = (run_dir / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert all(f"val/loss_t{t}" in header and f"val/pck@0.1_t{t}" in header for t in (50, 300, 600, 850))
    assert list((run_dir / "wandb").glob("offline-run-*/*.wandb")), "W&B writes offline, without an account"
    assert list((run_dir / "wandb").rglob("samples_*.table.json")), "a row for each shown image after a validation"


def test_the_head_samples(place: Path, root: Path, head: Path):
    done = run(place, root, "rg.sample", "+experiment=pose_control", f"head.path={head}", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    latest = place / "outputs" / "pose_control" / "latest"
    assert Image.open(latest / "00001.png").size == (64, 64)
    assert (latest / "grid.png").is_file()


@pytest.mark.parametrize("task", ["depth", "edge"])
def test_a_depth_and_an_edge_head_train_sample_and_ship(place: Path, root: Path, task: str):
    small = ["data.size=8", "data.val_size=2", "data.batch_size=4", "data.epoch_batches=2", "trainer.max_steps=2"]
    done = run(place, root, "rg.train", f"+experiment={task}", *small, "trainer.check_val_every_n_epoch=1")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = place / "outputs" / task / "latest"
    (place / f"{task}.png").write_bytes(_label(place / "data" / f"marionette_{task}" / "train" / "shard-000000.tar"))
    words = [f"head.path={run_dir}/head", f"control={task}.png", "prompt=a person on grass"]
    done = run(place, root, "rg.sample", f"+experiment={task}_control", *words, *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(place, root, "rg.evaluate", f"data={task}", f"guidance={task}", f"head.path={run_dir}/head", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((place / "outputs" / "eval_pck" / "latest" / "results.json").read_text())["images"] == 2
    assert f"python -m rg.train +experiment={task}" in (ship(run_dir, task, place) / "README.md").read_text()
    # In that folder the head is found by its name; its controls are the labels of held-out images.
    done = run(place / "heads", root, "rg.sample", f"+experiment={task}_control", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    for folder in (place, place / "heads"):
        assert Image.open(folder / "outputs" / f"{task}_control" / "latest" / "00001.png").size == (64, 64)


def _label(shard: Path) -> bytes:
    """The first label of a shard, as a grey image."""
    with tarfile.open(shard) as archive:
        name = next(name for name in archive.getnames() if name.endswith("label.png"))
        image = Image.open(archive.extractfile(name)).convert("L")
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def test_the_evaluation_continues(place: Path, root: Path, head: Path):
    overrides = [f"head.path={head}", *TINY, "batch_size=1"]
    done = run(place, root, "rg.evaluate", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    latest = place / "outputs" / "eval_pck" / "latest"
    first = json.loads((latest / "results.json").read_text())
    for scores in first["judges"].values():
        assert set(scores["pck"]) == {"0.05", "0.1", "0.2"}
        assert set(scores["pck"]["0.05"]) == {"unguided", "guided", "ceiling", "gain", "share_of_ceiling"}
    assert first["images"] == 2 and first["command"].startswith("python -m rg.evaluate")
    assert "PCK@0.05" in (latest / "table.md").read_text() and "PCK@0.05" in done.stdout
    # As if it had been broken off after the first image.
    kept = (latest / "samples" / "00000.json").stat().st_mtime_ns
    for path in (latest / "results.json", latest / "samples" / "00001.json"):
        path.unlink()
    done = run(place, root, "rg.evaluate", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    second = json.loads((latest / "results.json").read_text())
    assert second["judges"] == first["judges"] and len(first["judges"]) == 2
    assert (latest / "samples" / "00000.json").stat().st_mtime_ns == kept, "what was done is not done again"
    # A broken-off run of another head is set aside, not mixed in.
    (latest / "results.json").unlink()
    settings = latest / "settings.json"
    settings.write_text(settings.read_text().replace('"head": "', '"head": "f'))
    done = run(place, root, "rg.evaluate", *overrides)
    assert done.returncode == 0 and "another head" in done.stdout, done.stdout + done.stderr
    assert len(list(latest.glob("samples-*"))) == 1 and (latest / "samples" / "00001.json").is_file()


def test_the_evaluation_takes_any_tolerances(place: Path, root: Path, head: Path):
    done = run(place, root, "rg.evaluate", f"head.path={head}", "alphas=[0.05]", *TINY)
    assert done.returncode == 0 and "PCK@0.05" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "overrides", "named"),
    [
        ("rg.train", ["+experiment=poze_100"], "poze_100"),
        ("rg.train", ["+experiment=pose_100", "data.sise=3"], "sise"),
        ("rg.evaluate", ["alphas=[0.5,1.5]"], "1.5"),
        ("rg.evaluate", ["head.path=nowhere"], "nowhere"),
        ("rg.evaluate", ["images=0"], "images"),
        ("rg.sample", ["+experiment=pose_control", "control=missing.png"], "missing.png"),
        ("rg.sample", ["+experiment=pose_control", "control=damaged.png"], "damaged.png: expected an image"),
        ("rg.sample", ["+experiment=pose_control", "scheduler=eular"], "eular"),
        ("rg.sample", ["+experiment=pose_control", "head.released=pose"], "got 'marionette'"),
        ("rg.sample", ["+experiment=pose_control", "head.released=poze"], "poze"),
        ("rg.sample", ["+experiment=pose_control", "head.released=pose", "world.family=sdxl"], "sdxl_spatial_pose.pt"),
    ],
)
def test_bad_input_is_one_clear_error(place: Path, root: Path, module: str, overrides: list[str], named: str):
    (place / "damaged.png").write_bytes(b"no image")
    done = run(place, root, module, *overrides)
    message = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert named in done.stderr
    assert not any(line.startswith("Traceback") for line in message), done.stderr
