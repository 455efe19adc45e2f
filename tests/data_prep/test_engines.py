import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.utils import instantiate

from data_prep.engines import Pool, Ray, Serial, Slurm, local
from data_prep.prepare import build
from data_prep.sources.marionette import MarionetteSource
from rg.data.samples import DataError
from rg.data.shards import Manifest, read_shards

SERIAL, POOL = ({"_target_": f"data_prep.engines.{name}"} for name in ("Serial", "Pool"))
RAY = {"_target_": "data_prep.engines.Ray"}
SLURM = {"_target_": "data_prep.engines.Slurm", "cluster": "local", "workers": 2, "folder": "jobs"}


def marks(package):
    return [pytest.mark.slow, pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")]


ENGINES = [
    pytest.param(POOL, id="pool", marks=pytest.mark.slow),
    pytest.param(RAY, id="ray", marks=marks("ray")),
    pytest.param(SLURM, id="slurm", marks=marks("submitit")),
]


class Deadly(MarionetteSource):
    """Renders, but kills its process, or fails, at index 9 as long as the folder holds files named deadly-*."""

    def __init__(self, *, error=None, **settings):
        super().__init__(**settings)
        self.error = error

    def read(self, split, indices):
        lives = sorted(Path.cwd().glob("deadly-*"))
        if 9 in indices and lives:
            lives[0].unlink()
            if self.error == "disk":
                raise OSError(28, "No space left on device", "out/train/shard-000002.tar")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(split, indices)


def die(name, task):
    """Work that leaves a file and its size, and kills its process at one task."""
    if task is None:
        os.kill(os.getpid(), signal.SIGKILL)
    Path(name).write_text(task)
    return {"size": len(task)}


@pytest.fixture
def recipe(tmp_path, tiny_pipeline, monkeypatch):
    """Shards of four renders of 32x32 with poses; relative paths are to an empty folder."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return {
        "source": {"_target_": f"{__name__}.Deadly", "resolution": 32},
        "annotator": {"_target_": "data_prep.annotators.rendered.ExactPose", "line_width": 1.0},
        "backbone": {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": "model"},
        "shard_size": 4,
    }


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_makes_the_same_bytes_and_a_killed_workers_shard_again(recipe, engine, caplog):
    build(root="serial", n=14, **recipe)
    Path("deadly-0").touch()
    build(root="other", n=14, engine=engine, **recipe)
    assert not Path("deadly-0").exists() and any("shard-000002.tar: " in text for text in caplog.messages)
    assert contents("other/train") == contents("serial/train") and len(contents("serial/train")) == 6
    assert read_shards("other/train").index.tolist() == list(range(14))


@pytest.mark.parametrize("engine", ENGINES)
def test_what_dies_every_time_is_given_up_by_name_and_the_others_are_done(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks, found = {"a": "one", "b": None, "c": "three"}, {}
    with pytest.raises(DataError, match=r"^b: .*died in each of 2 tries"):
        for name, made in instantiate(engine, tries=2).map(die, tasks):
            found[name] = made["size"]
    assert found == {"a": 3, "c": 5} and (tmp_path / "c").read_text() == "three"


@pytest.mark.slow
def test_a_full_disk_ends_the_pool_with_what_is_finished_kept(recipe):
    recipe["source"]["error"] = "disk"
    Path("deadly-0").touch()
    with pytest.raises(DataError, match=r"No space left on device.*shard-000002\.tar"):
        build(root="out", n=16, engine=POOL, **recipe)
    found = Manifest.read(Path("out/train")).indices()
    assert found and not set(found) & set(range(8, 12)) and read_shards("out/train").index.tolist() == found
    assert not list(Path("out/train").glob("*.part"))
    build(root="out", n=16, **recipe)
    assert read_shards("out/train").index.tolist() == list(range(16))


def descendants(pid):
    """Process numbers of a process's children, and of theirs."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for task in tasks for child in task.read_text().split()]
    return children + [other for child in children for other in descendants(child)]


class Picky:
    """Fails for one sample, in a batch of many."""

    def __init__(self, *, kind="ValueError"):
        self.kind = kind

    def annotate(self, samples):
        if any(sample.seed[-1] == 6 for sample in samples):
            raise {"ValueError": ValueError, "TypeError": TypeError}[self.kind]("this one")
        return instantiate({"_target_": "data_prep.annotators.rendered.ExactPose", "line_width": 1.0}).annotate(samples)


@pytest.mark.parametrize("engine", [SERIAL, pytest.param(POOL, marks=pytest.mark.slow)])
def test_an_annotators_error_names_the_sample(recipe, engine):
    recipe["annotator"] = {"_target_": f"{__name__}.Picky"}
    with pytest.raises(DataError, match=r"train: the image of seed \(0, 0, 6\) \(sample 00000006\): this one"):
        build(root="out", n=12, engine=engine, **recipe)
    assert Manifest.read(Path("out/train")).indices()[:4] == list(range(4))
    recipe["annotator"]["kind"] = "TypeError"
    with pytest.raises((TypeError, RuntimeError)) as caught:
        build(root="other", n=12, engine=engine, **recipe)
    told = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "this one" in told and "sample 00000006" in told


@pytest.mark.slow
def test_workers_end_with_a_killed_parent_and_with_one_that_is_stopped(recipe, root):
    Path("settings.json").write_text(json.dumps({"root": "out", "n": 4000, "engine": POOL, **recipe}))
    script = "import json, sys\nfrom data_prep.prepare import build\n"
    Path("run.py").write_text(script + "if __name__ == '__main__': build(**json.load(open('settings.json')))\n")
    environment = os.environ | {"PYTHONPATH": str(root)}
    for number in (signal.SIGKILL, signal.SIGINT):
        before = len(list(Path("out/train").glob("*.tar")))
        process = subprocess.Popen([sys.executable, "run.py"], env=environment, stderr=subprocess.DEVNULL)
        while len(list(Path("out/train").glob("*.tar"))) < before + 4:
            assert process.poll() is None
            time.sleep(0.05)
        workers = descendants(process.pid)
        process.send_signal(number)
        process.wait(20)
        end = time.monotonic() + 20
        while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(workers) >= 2 and not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers)
        found = Manifest.read(Path("out/train")).indices()
        assert found and read_shards("out/train").index.tolist() == found
    assert not list(Path("out/train").glob("*.part")), "a stopped one leaves nothing half-written"


def test_one_worker_is_this_process_and_several_are_a_pool():
    assert isinstance(local(), Serial)
    pool = local(workers=3, tries=2)
    assert isinstance(pool, Pool) and (pool.workers, pool.tries, pool.threads) == (3, 2, 1)
    for bad in ({"workers": 0}, {"workers": 2, "tries": 0}):
        with pytest.raises(DataError, match=r"engine\.(workers|tries): .*1.* 0"):
            local(**bad)


@pytest.mark.parametrize(("engine", "package"), [(partial(Ray), "ray"), (partial(Slurm), "submitit")])
def test_a_missing_package_is_one_line(engine, package, monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, package, raising=False)
    extra = {"ray": "ray", "submitit": "slurm"}[package]
    with pytest.raises(DataError, match=rf"engine={extra}: .*{package}.*pip install 'readout-guidance\[{extra}\]'"):
        engine()


def test_slurm_is_looked_for_before_any_work(monkeypatch, tmp_path):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"engine\.cluster=slurm: .*srun.* none"):
        Slurm()
