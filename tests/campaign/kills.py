"""Kills label making, training and evaluation at random moments, or lets the disk be full, and goes on each time:

python -m tests.campaign.kills seed=0 kills=100 full=20
"""

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tqdm import tqdm

from rg.callbacks import newest_checkpoint, read_checkpoint
from rg.cli import compose_config
from rg.data.shards import Manifest, read_shards
from rg.evaluate import Evaluation
from rg.train import train
from tests.campaign import watch
from tests.campaign.kinds import draw, pose
from tests.campaign.settings import COMMANDS, Command

SHARES = ["pictures.validation_share=0.2", "pictures.test_share=0.3", "pictures.seed=1", "data.builder.shard_size=3"]
STEPS, EVERY = 12, 2  # of a training, and from one checkpoint to the next


def make(folder: Path) -> None:
    """Images, labels and models."""
    Command("rg.train", 1).make(folder)
    for number in range(4, 24):
        Image.fromarray(draw(number, 32, 32, 3)).save(folder / "images" / f"{number}.png")
        (folder / "labels" / f"{number}.json").write_text(json.dumps({"keypoints": pose(number)}))


def configured(name: str, *words: str) -> DictConfig:
    own = [word for word in COMMANDS[name] if not word.startswith(("pictures.v", "pictures.t", "pictures.seed"))]
    return compose_config(name.split(".")[-1], [*own, *SHARES, "run_dir=run", *words])


def make_labels() -> None:
    builder = configured("rg.train").data.builder
    instantiate(builder, root="run")(split="train", n=None)


def train_head() -> None:
    words = [f"trainer.max_steps={STEPS}", "data.size=8", "data.batch_size=4", "data.epoch_batches=5"]
    cfg = configured("rg.train", *words, "data.val_size=2")
    OmegaConf.update(cfg, "trainer.callbacks[0].every_n_train_steps", EVERY)
    train(cfg, Path("run"))


def evaluate_head() -> None:
    Evaluation(configured("rg.evaluate", "images=4", "batch_size=2", "guidance.readout_scale=10"), Path("run")).run()


def labels_left(run: Path) -> dict[str, Any]:
    """Every file of the folder; what is there before the end must be readable."""
    folder = run / "train"
    if (folder / "manifest.json").exists():
        indices = Manifest.read(folder).indices()
        assert not indices or read_shards(folder).index.tolist() == indices
    return {path.name: path.read_bytes() for path in folder.glob("*.*") if not path.name.endswith(".part")}


def head_left(run: Path) -> dict[str, Any]:
    newest_checkpoint(run / "checkpoints")
    return {path.name: path.read_bytes() for path in run.glob("head/*")}


def images_left(run: Path) -> dict[str, Any]:
    """Images and scores; records hold times too."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in run.glob("samples/*.png")}
    for path in (*run.glob("samples/*.json"), *run.glob("results.json")):
        record = json.loads(path.read_text())
        found[path.name] = json.dumps({key: record.get(key) for key in ("judges", "agreement", "images")})
    return found


JOBS: dict[str, tuple[Callable[[], None], Callable[[Path], dict[str, Any]]]] = {
    "labels": (make_labels, labels_left),
    "training": (train_head, head_left),
    "evaluation": (evaluate_head, images_left),
}


def attempt(job: Callable[[], None], seconds: float | None, limit: int | None) -> str:
    """Runs a job in a process that is killed after some seconds, or may write files of `limit` bytes alone."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            job()
            status = 0
        except OSError:
            status = 3
        except BaseException as error:
            Path("error.txt").write_text(repr(error))
            status = 4
        finally:
            os._exit(status)
    end = time.monotonic() + (seconds or 600)
    while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.002)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
        found = os.waitpid(child, 0)
    if os.WIFSIGNALED(found[1]):
        return "killed"
    return {0: "done", 3: "disk full"}.get(os.waitstatus_to_exitcode(found[1]), "failed")


def step(run: Path) -> int:
    path = newest_checkpoint(run / "checkpoints") if (run / "checkpoints").exists() else None
    return 0 if path is None else read_checkpoint(path)["global_step"]


def torture(name: str, kills: int, full: int, rng: np.random.Generator) -> dict[str, Any]:
    """Goes on with a job until it was stopped as often as asked; every time it ends it is compared and begun anew."""
    job, left = JOBS[name]
    run, counts, lost = Path("run"), Counter[str](), 0
    begin = time.monotonic()
    assert attempt(job, None, None) == "done"
    seconds, whole = time.monotonic() - begin, left(run)
    shutil.rmtree(run)
    while counts["killed"] < kills or counts["disk full"] < full:
        limited = counts["disk full"] < full and rng.random() < full / (kills + full)
        limit = int(2 ** rng.uniform(6, 18)) if limited else None
        before, had = left(run) if run.exists() else {}, step(run)
        outcome = attempt(job, None if limited else rng.uniform(0.2, 1.1) * seconds, limit)
        counts[outcome] += 1
        after = left(run) if run.exists() else {}
        lost += sum(after.get(key) != value for key, value in before.items() if key != "manifest.json")
        lost += step(run) < had
        if outcome == "done":
            counts["different at the end"] += after != whole
            shutil.rmtree(run)
        elif outcome == "failed":
            counts[Path("error.txt").read_text()[:200]] += 1
    return {"seconds": round(seconds, 1), **counts, "finished things lost or changed": lost}


def main(words: list[str]) -> None:
    settings = {"seed": "0", "kills": "100", "full": "20", "jobs": ",".join(JOBS)}
    settings |= dict(word.split("=", 1) for word in words)
    watch.prepare()
    tqdm.set_lock(RLock())  # its own is shared with forked processes: one that is killed there would stop all others
    jobs = settings["jobs"].split(",")
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        os.chdir(place)
        for number, name in enumerate(jobs):
            share = [len(range(number, int(settings[kind]), len(jobs))) for kind in ("kills", "full")]
            rng = np.random.default_rng((int(settings["seed"]), number))
            print(name, torture(name, *share, rng), flush=True)
        os.chdir("/")


if __name__ == "__main__":
    main(sys.argv[1:])
