"""How often keypoints are where they should be, with and without guidance: python -m rg.evaluate"""

import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor
from torch.utils.data import default_collate

from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import claimed, command, link_latest, load_configured_head
from rg.data.samples import Groups, Samples
from rg.data.shards import read_shards
from rg.detectors.clip import ClipFeatures
from rg.detectors.detection import Detector
from rg.distill.networks import load_adapter, with_adapter
from rg.generation import check_sampling, generate, image_seeds, image_size, per_image, set_scheduler
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget
from rg.heads.base import ReadoutHead
from rg.io.figures import image_grid, save_figure
from rg.io.files import fingerprint, write_json, write_text
from rg.io.images import from_bytes, open_saved, pixels, save_image
from rg.metrics.keypoints import check_alphas, measurable
from rg.metrics.words import fidelity
from rg.models import locate
from rg.points import Size, draw_skeletons
from rg.report import (
    CONDITIONS,
    agreements,
    distances_to,
    objectives,
    read_record,
    score_images,
    share_of_words,
    summarise,
    table,
)

log = logging.getLogger(__name__)
BESIDE_IMAGES = (
    "resume",
    "run_dir",
    "objectives",
    "batch_size",
    "verbose",
    "engine",
)  # settings on which no image depends
Verdicts = dict[str, dict[str, list[dict[str, Any]]]]  # judge -> condition -> of each image


def check_settings(cfg: DictConfig) -> None:
    """Raises ValueError for what can be refused before any work."""
    check_alphas(cfg.alphas)
    for name in ("images", "batch_size"):
        if cfg[name] < 1:
            raise ValueError(f"{name}: expected at least 1, got {cfg[name]}")
    if "words" in cfg.objectives and cfg.world.classifier is None:
        raise ValueError(
            "objectives: expected [pck] where world.classifier is null and nobody reads words, found words"
        )


def labeller_among(judges: Sequence[str], detectors: DictConfig, labelled_by: str | None) -> str | None:
    """Which of the judges is the annotator, a class by its name, that made a head's labels; None where none is."""
    makers = {judge: detectors[judge].get("annotator", {}).get("_target_", "").split(".")[-1] for judge in judges}
    return next((judge for judge, maker in makers.items() if maker and maker == labelled_by), None)


def choose_judges(cfg: DictConfig, labelled_by: str | None) -> list[str]:
    """The names of an evaluation's judges, the headline's first, one who made the head's labels last.

    Args:
        cfg: of the evaluation.
        labelled_by: the class of the annotator that made the head's labels, see ReadoutHead.

    Raises:
        ValueError: world.judges names another than one of world.detectors, or one twice; one of them made the labels
            that the head was trained on, and cfg does not allow that.
    """
    names, known = list(cfg.world.judges), list(cfg.world.detectors)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"world.judges: expected some of {known}, found {unknown}")
    if len({*names}) < len(names):
        raise ValueError(f"world.judges: expected each judge once, found {names}")
    labeller = labeller_among(names, cfg.world.detectors, labelled_by)
    if labeller and not cfg.allow_same_judge:
        others = ",".join(name for name in known if name != labeller)
        raise ValueError(
            f"world.judges={names}: expected judges that did not make the labels that the head was trained on, found "
            f"{labeller}, and {labelled_by} made them: take others, world.judges=[{others}], or have it reported last, "
            "and marked, by allow_same_judge=true"
        )
    return sorted(names, key=lambda name: name == labeller)


def load_judges(cfg: DictConfig, labelled_by: str | None) -> dict[str, Detector]:
    """The judges that `choose_judges` names, in that order.

    Raises:
        ValueError: see there.
        FileNotFoundError: the weights of one are missing.
    """
    return {name: instantiate(cfg.world.detectors[name]) for name in choose_judges(cfg, labelled_by)}


def measurable_samples(samples: Samples | Groups) -> Samples:
    """The samples that keypoints can be measured on: those of a person with two visible ones, which have a distance.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(samples, Samples):
        raise ValueError("data: expected images with keypoints, such as data=pose, found groups of images")
    kept = measurable(samples.keypoints[..., :2], samples.keypoints[..., 2] > 0).any(1)
    if not kept.any():
        raise ValueError(f"data: expected images with a person to measure, found none in {len(samples)} images")
    return samples.take(kept.nonzero().flatten().tolist())


class Evaluation:
    """Samples and scores the held-out poses, a file per image: a broken-off run goes on where it stopped."""

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        check_settings(cfg)
        self.cfg, self.run_dir = cfg, run_dir
        self.head: ReadoutHead = load_configured_head(cfg.head, cfg.world.family)
        self.judges = load_judges(cfg, self.head.labelled_by)
        self.labeller = labeller_among([*self.judges], cfg.world.detectors, self.head.labelled_by)
        self.clip = None if cfg.clip is None else ClipFeatures.from_pretrained(cfg.clip)
        self.backbone: DiffusionBackbone = instantiate(cfg.world.backbone)
        self.head.check_taps(self.backbone.tap_channels, self.backbone.time_embed_dim, self.backbone.condition_dim)
        self.head.to(self.backbone.device)
        self.classifier = None if cfg.world.classifier is None else instantiate(cfg.world.classifier)
        set_scheduler(self.backbone.pipeline, cfg.scheduler)
        self.sampling = check_sampling(self.backbone, cfg.sampling)
        self.pipe, self.adapter = self.backbone.pipeline, None
        if cfg.adapter is not None:
            self.adapter = load_adapter(cfg.adapter)
            self.pipe = with_adapter(self.pipe, self.adapter)
        made, seen = image_size(self.backbone, cfg.sampling), self.backbone.resolution
        if made != seen:
            raise ValueError(f"sampling.height, sampling.width: expected {seen}, as the judges do, got {made}")
        # A bad setting of guidance is said before any image is made.
        instantiate(cfg.guidance)(terms=[GuidanceTerm(self.head)]).check_noise(cfg.sampling.get("eta"))
        instantiate(cfg.data.builder)(split=cfg.split, n=cfg.images)
        folder = Path(cfg.data.root) / cfg.split
        found = read_shards(folder, cfg.images, autoencoder_id=self.backbone.autoencoder_id)
        self.samples = measurable_samples(found)
        self.left_out = len(found) - len(self.samples)
        if self.left_out:
            log.info("%d of %d images show nobody to measure and are left out", self.left_out, len(found))
        self._claim_folder()

    def _claim_folder(self) -> None:
        weights = hashlib.sha256(b"".join(t.cpu().numpy().tobytes() for t in self.head.state_dict().values()))
        settings = OmegaConf.to_container(self.cfg, resolve=True)
        settings = {key: settings[key] for key in settings if key not in BESIDE_IMAGES}
        del settings["world"]["batch_size"], settings["data"]["builder"]["engine"]  # no image depends on them
        content = {"settings": settings, "head": weights.hexdigest()}
        if self.adapter is not None:
            content["adapter"] = fingerprint(locate(self.cfg.adapter, "adapters"))
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        path = self.run_dir / "settings.json"
        if path.is_file() and path.read_bytes() != text.encode() and (self.run_dir / "samples").is_dir():
            name = f"samples-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
            asides = (self.run_dir / f"{name}{ending}" for ending in ["", *(f"-{n}" for n in range(1, 10_000))])
            aside = next(folder for folder in asides if not folder.exists())
            (self.run_dir / "samples").rename(aside)
            log.warning("this run was begun with another head or other settings; its samples are now in %s", aside)
        write_text(path, text)

    def record_path(self, position: int) -> Path:
        return self.run_dir / "samples" / f"{position:05d}.json"

    def image_path(self, position: int, condition: str) -> Path:
        return self.run_dir / "samples" / f"{position:05d}-{condition}.png"

    def run(self) -> dict[str, Any]:
        """Samples what is missing, writes results.json, table.md and grid.png, and returns the results."""
        todo, size = set(self.unfinished()), self.cfg.batch_size
        batches = [range(len(self.samples))[start : start + size] for start in range(0, len(self.samples), size)]
        batches = [batch for batch in batches if not todo.isdisjoint(batch)]
        # All of a batch, as without a break: the last bits of an image depend on how many are made at once.
        tasks = {f"positions {b[0]} to {b[-1]}": [list(b), sorted(todo.intersection(b))] for b in batches}
        made = instantiate(self.cfg.engine, _convert_="all").map(self, tasks)
        for _ in track(made, description="sampling", total=len(tasks), disable=not tasks):
            pass
        records = [self.read(i) for i in range(len(self.samples))]
        results = summarise(records, self.cfg.alphas, [*self.judges])
        results["left_out"], results["labeller"] = self.left_out, self.labeller
        results |= self.distances()
        results["words"] = None if (right := self.words) is None else share_of_words(right)
        results["seconds"] = {c: sum(r["seconds"][c] for r in records) for c in ("unguided", "guided")}
        results["command"] = shlex.join(["python", "-m", "rg.evaluate", *sys.argv[1:]])
        write_text(self.run_dir / "table.md", table(results))
        save_figure(self.grid(), self.run_dir / "grid.png")
        write_json(self.run_dir / "results.json", results)
        return results

    def __call__(self, name: str, task: Sequence[Sequence[int]]) -> None:
        """Makes one batch: its positions, and those of them that are missing."""
        self.sample(*task)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process an evaluation is made anew of its settings, which loads the networks there."""
        settings = OmegaConf.create(OmegaConf.to_container(self.cfg, resolve=True))
        return resolve_name("rg.evaluate.Evaluation"), (settings, self.run_dir)

    def distances(self) -> dict[str, dict[str, float] | None]:
        """Of each condition's images to the samples' own: by the first judge with features, and by CLIP if given."""
        images = {condition: self.images(condition) for condition in CONDITIONS}
        own = torch.stack([sample["image"] for sample in self.samples])
        embed = next((judge.embed for judge in self.judges.values() if hasattr(judge, "embed")), None)
        return {
            "kernel_distance": None if embed is None else distances_to(own, images, embed),
            "cmmd": None if self.clip is None else distances_to(own, images, self.clip.embed, clip=True),
        }

    @cached_property
    def words(self) -> dict[str, Tensor] | None:
        """Condition -> whether each finished image has shirt and trousers as asked for (N,), see `fidelity`; None where
        nobody reads them.

        The samples' own images show other prompts: there is no ceiling.
        """
        if self.classifier is None:
            return None
        prompts = [self.read(position)["prompt"] for position in range(len(self.samples))]
        read = {condition: self.classifier.read(self.images(condition)) for condition in ("unguided", "guided")}
        return {condition: fidelity(found, prompts) for condition, found in read.items()}

    def read(self, position: int) -> dict[str, Any]:
        """The record of a position whose images are all there; raises ValueError where a file of it is damaged."""
        record = read_record(self.record_path(position), position, self.cfg.alphas, [*self.judges])
        shown = [*CONDITIONS, *(["readout"] if self.image_path(position, "readout").exists() else [])]
        for condition in shown:
            self.image(position, condition)
        return record

    def unfinished(self) -> list[int]:
        """The positions that are still to be made; a damaged one is said."""
        todo = []
        for position in range(len(self.samples)):
            try:
                if self.record_path(position).exists():
                    self.read(position)
                    continue
            except ValueError as error:
                log.warning("%s; the images of position %d are made again", error, position)
            todo.append(position)
        return todo

    def sample(self, positions: Sequence[int], todo: Collection[int]) -> None:
        """Unguided and guided made from the same seeds, the autoencoder's own, and their scores; writes those of
        `todo`."""
        batch = [self.samples[i] for i in positions]
        keypoints = torch.stack([sample["keypoints"] for sample in batch])
        control = self.head.control(default_collate(batch))
        guidance = instantiate(self.cfg.guidance)(terms=[GuidanceTerm(self.head, FixedTarget(control))])
        # Another image's prompt: what it says must not give the pose away.
        prompts = [self.samples.prompt[(i + len(self.samples) // 2) % len(self.samples)] for i in positions]
        arguments = {"seeds": image_seeds(self.cfg.seed, positions), **self.sampling}
        if arguments.get("negative_prompt") is not None:
            texts = per_image("sampling.negative_prompt", arguments["negative_prompt"], len(self.samples))
            arguments["negative_prompt"] = [texts[i] for i in positions]
        if self.adapter is not None:
            shown = self.backbone.resolution
            arguments["image"] = draw_skeletons(keypoints, shown, shown, self.cfg.world.line_width)
        made, seconds = {}, {}
        for condition, steering in (("unguided", None), ("guided", guidance)):
            begin = time.perf_counter()
            made[condition] = self.make(prompts, steering, positions, arguments)
            seconds[condition] = (time.perf_counter() - begin) / len(positions)
        made["ceiling"] = self.backbone.decode(torch.stack([sample["latent_mean"] for sample in batch])).cpu()
        readouts = None
        if guidance.trace and guidance.trace[-1].readouts:  # none without guidance.keep_readouts
            readouts = self.head.preview(guidance.trace[-1].readouts[0]).cpu()
        judges, agreement = self.judge(made, keypoints)
        for row, position in enumerate(positions):
            if position not in todo:
                continue
            for condition, images in made.items():
                save_image(images[row], self.image_path(position, condition))
            if readouts is not None:
                save_image(readouts[row] * 2 - 1, self.image_path(position, "readout"))
            record = {"position": position, "prompt": prompts[row], "seconds": seconds}
            for name, verdicts in (("judges", judges), ("agreement", agreement)):
                record[name] = {j: {c: verdict[c][row] for c in CONDITIONS} for j, verdict in verdicts.items()}
            write_json(self.record_path(position), record)

    def judge(self, made: Mapping[str, Tensor], keypoints: Tensor) -> tuple[Verdicts, Verdicts]:
        """What every judge says of a batch's images under each condition, and how far each agrees with the first.

        Args:
            made: images (B, 3, H, W) of every condition.
            keypoints: (B, P, 18, 3), the poses asked for.
        """
        # One condition at a time, as the last bits of what is detected depend on how many images there are.
        found = {
            judge: {condition: detector.detect(images, keypoints.shape[1]) for condition, images in made.items()}
            for judge, detector in self.judges.items()
        }
        alphas, (first, *others) = self.cfg.alphas, found
        scores = {
            judge: {condition: score_images(seen, keypoints, alphas) for condition, seen in by_condition.items()}
            for judge, by_condition in found.items()
        }
        same = {
            other: {c: agreements(found[first][c], seen, keypoints, alphas) for c, seen in found[other].items()}
            for other in others
        }
        return scores, same

    def make(
        self,
        prompts: Sequence[str],
        guidance: ReadoutGuidance | None,
        positions: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of the prompts of `positions`, guided or not; see `generate`."""
        return generate(self.pipe, prompts, guidance=guidance, **arguments)

    def images(self, condition: str, count: int | None = None) -> Tensor:
        """Saved images of a condition: (N, 3, H, W) in [-1, 1]."""
        return torch.stack([self.image(i, condition) for i in range(len(self.samples))[:count]])

    def image(self, position: int, condition: str) -> Tensor:
        """A saved image: (3, H, W) in [-1, 1], of the backbone's resolution, a readout of its own."""
        size = self.backbone.resolution if condition in CONDITIONS else None
        return self.read_image(self.image_path(position, condition), size)

    def read_image(self, path: Path, size: Size | None = None) -> Tensor:
        """A saved image: (3, H, W) in [-1, 1]; raises ValueError where it is of another size than asked for."""
        return from_bytes(pixels(open_saved(path, size)))

    def grid(self, count: int = 10) -> Any:
        """Target pose, image it came from, unguided, guided, readout during guidance, detected pose."""
        size = self.backbone.resolution
        keypoints = self.samples.keypoints[:count]
        first = next(iter(self.judges))
        points = [self.read(i)["judges"][first]["guided"]["points"] for i in range(len(keypoints))]
        asked = (keypoints[..., 2:] > 0).any(-2, keepdim=True).expand_as(keypoints[..., 2:])
        found = torch.cat([torch.tensor(points), asked], -1)
        shown = (4 * size[0], 4 * size[1])
        rows = {
            "target pose": draw_skeletons(keypoints, size, shown, 6.0),
            "unguided": (self.images("unguided", count) + 1) / 2,
            "guided": (self.images("guided", count) + 1) / 2,
        }
        if all(self.image_path(i, "readout").is_file() for i in range(len(keypoints))):
            rows["readout"] = (self.images("readout", count) + 1) / 2
        rows["detected pose"] = draw_skeletons(found, size, shown, 6.0)
        return image_grid(rows)


def evaluate(cfg: DictConfig, run_dir: Path) -> dict[str, Any]:
    """Runs the evaluation that `cfg` describes in run_dir, prints the table, and points `latest` at it.

    Raises:
        ValueError: another process works in run_dir; see Evaluation.
    """
    with claimed(run_dir):
        results = Evaluation(cfg, run_dir).run()
    link_latest(run_dir)
    print(table(results) + f"\n{run_dir}/grid.png\n{run_dir}/results.json")
    return results


@command("evaluate", stopped="finished images are kept; the same command goes on")
def main(cfg: DictConfig) -> float | tuple[float, ...]:
    """Evaluates one head; returns its `cfg.objectives`, for Hydra's sweepers."""
    return objectives(evaluate(cfg, Path(HydraConfig.get().runtime.output_dir)), cfg.objectives)


if __name__ == "__main__":
    main()
