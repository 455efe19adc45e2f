"""What is mutated and who reads it: small files of every kind that this project writes or is given."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer
from webdataset import TarWriter

from data_prep.annotators.files import FileLabels
from data_prep.records import Skip
from data_prep.sources.folders import FolderSource
from experiments.quality.errors import errors
from experiments.quality.sweeps import evaluation_table, training_table
from rg.backbone.diffusion import DiffusionBackbone
from rg.callbacks import Checkpoints, newest_checkpoint, read_checkpoint
from rg.data.samples import Group, Sample, to_png
from rg.data.shards import Manifest, read_shards
from rg.detectors import AttributeClassifier, KeypointDetector, PoseTransformer
from rg.edit import Frame, parse_boxes, parse_drag, parse_terms
from rg.heads import load_head, released
from rg.heads.spatial import SpatialHead
from rg.io.files import read_json
from rg.io.images import load_control, open_image, open_mask, open_saved, pixels, save_image
from rg.io.records import validate
from rg.report import read_record
from rg.settings import check
from tests import families
from tests.campaign.watch import Report
from tests.rg.heads.test_released import make_record

ROOT = Path(__file__).parents[2]
SIZE = (32, 32)
ALPHAS = (0.1, 0.2)


@dataclass(frozen=True)
class Kind:
    """Files and their reader.

    Attributes:
        make: writes the files into an empty folder.
        read: reads that folder, which is the current one.
        mutated: pattern of the files of which one is changed.
        named: what a clear error may call them, beside the changed file's name.
        weight: share of the cases.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    mutated: str = "**/*"
    named: tuple[str, ...] = ()
    weight: float = 1.0


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)


def pose(seed: int = 0, people: int = 1) -> list[Any]:
    points = np.random.default_rng(seed).uniform(0, 31, (people, 18, 2))
    return np.concatenate([points, np.ones((people, 18, 1))], -1).tolist()


def image_kind(ending: str, **settings: Any) -> Kind:
    def make(folder: Path) -> None:
        smooth = np.asarray(Image.fromarray(draw(1, 4, 5, 3)).resize((30, 24), Image.Resampling.BICUBIC))
        Image.fromarray(smooth).save(folder / f"image.{ending}", **settings)

    return Kind(make, lambda folder: pixels(open_image(folder / f"image.{ending}")))


def make_mask(folder: Path) -> None:
    Image.fromarray(draw(2, 24, 30, 3)).convert("P").save(folder / "mask.png", transparency=3)


def read_mask(folder: Path) -> Any:
    return torch.from_numpy(open_mask(folder / "mask.png"))


def make_folders(folder: Path) -> None:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for number, ending in enumerate(("png", "jpg", "webp", "bmp")):
        Image.fromarray(draw(number, 24, 30, 3)).save(folder / "images" / f"{number}.{ending}")
        (folder / "images" / f"{number}.txt").write_text(f"a person in a shïrt of number {number}")
        (folder / "labels" / f"{number}.json").write_text(json.dumps({"keypoints": pose(number)}))
    Image.fromarray(draw(9, 24, 30, 3)).save(folder / "labels" / "2.png")


def read_folders(folder: Path) -> Report:
    source = FolderSource(path=str(folder / "images"), resolution=16, validation_share=0, test_share=0)
    read = source.read("train", range(source.count("train")))
    found = [item for item in read if not isinstance(item, Skip)]
    labels = FileLabels(path=str(folder / "labels")).annotate(found)
    kept = [
        (i.name, i.image, i.prompt, x.image, x.keypoints) for i, x in zip(found, labels, strict=True) if is_label(x)
    ]
    return Report(kept, [item.reason for item in (*read, *labels) if isinstance(item, Skip)])


def is_label(item: Any) -> bool:
    return not isinstance(item, Skip)


def make_control(folder: Path) -> None:
    (folder / "control.json").write_text(json.dumps({"size": [48, 64], "keypoints": pose(people=2)}))


def make_head(folder: Path) -> None:
    head = SpatialHead(tap_channels=[8, 4], time_embed_dim=6, projection_dim=16, norm_groups=2, hidden_channels=8)
    head.save_pretrained(folder)


def make_detector(folder: Path) -> None:
    KeypointDetector(widths=[8, 8, 8], finder_widths=[8, 8, 8], threshold=0.5).save_pretrained(folder)


def make_transformer(folder: Path) -> None:
    settings = {"widths": [8, 8, 8], "encoder_layers": 1, "decoder_layers": 1, "people": 2, "threshold": 0.5}
    PoseTransformer(**settings).save_pretrained(folder)


def make_classifier(folder: Path) -> None:
    AttributeClassifier(attributes={"shirt": ["red", "blue"]}, widths=[8, 8, 8], key_width=4).save_pretrained(folder)


def weights(network: nn.Module) -> dict[str, Any]:
    return {**network.state_dict(), "training": network.training, **{n: repr(m) for n, m in network.named_children()}}


def make_shards(folder: Path, records: list[Sample] | list[Group], kind: str) -> None:
    manifest = Manifest("train", {"shard_size": 3}, "a" * 16, {}, {}, {"00000002": "2.png cannot be read"}, kind)
    for number, start in enumerate((0, 3)):
        name = f"shard-{number:06d}.tar"
        chosen = [record for record in records if start <= record.index < start + 3 and record.index != 2]
        with TarWriter(str(folder / name), encoder=False, mtime=0) as writer:
            for record in chosen:
                writer.write(record.encode())
        manifest.shards[name] = {"start": start, "stop": start + 3, "samples": len(chosen)}
    manifest.write(folder)


def make_samples(folder: Path) -> None:
    def sample(index: int) -> Sample:
        image, label = map(to_png, torch.from_numpy(draw(index, 2, 3, 8, 8)))
        latent = torch.from_numpy(draw(index, 4, 2, 2)).half() / 256
        words = (f"image {index}", "noise", (0, index), [{"shirt": "red"}])
        return Sample(index, image, label, (8, 8), torch.tensor(pose(index)), latent, *words)

    make_shards(folder, [sample(index) for index in range(6)], "image")


def make_groups(folder: Path) -> None:
    def group(index: int) -> Group:
        images, points = tuple(map(to_png, torch.from_numpy(draw(index, 2, 3, 8, 8)))), torch.ones(3, 2, 3)
        latents = torch.from_numpy(draw(index, 2, 4, 2, 2)).half() / 256
        return Group(index, images, (8, 8), points * (index + 1), None, latents, f"group {index}", "video", None, None)

    make_shards(folder, [group(index) for index in range(6)], "group")


def make_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        state = {"layer.weight": torch.from_numpy(draw(step, 4, 4)).float()}
        content = {"state_dict": state, "global_step": step, "lr_schedulers": [{"last_epoch": step}], "epoch": 0}
        Checkpoints().save_checkpoint(content, folder / "last.ckpt")


def read_checkpoints(folder: Path) -> Any:
    path = newest_checkpoint(folder)
    return path and read_checkpoint(path)


def make_released(folder: Path) -> None:
    torch.save(make_record(18, dims=[8, 4]), folder / "head.pt")


def make_evaluated(folder: Path) -> None:
    make_samples(folder)
    settings = {
        "data": {"root": "."},
        "split": ".",
        "images": 2,
        "alphas": list(ALPHAS),
        "world": {"judges": ["a", "b"]},
    }
    (folder / "settings.json").write_text(json.dumps({"settings": settings, "head": "0"}))
    (folder / "samples").mkdir()
    for number in range(2):
        save_image(torch.from_numpy(draw(number, 3, 8, 8)) / 127.5 - 1, folder / "samples" / f"{number:05d}-guided.png")
        points = [[place[:2] for place in person] for person in pose(number)]
        shares = {box: dict.fromkeys(map(str, ALPHAS), 0.5) for box in ("target", "predicted")}
        scores = {"pck": shares, "oks": 0.5, "confidence": 0.5, "present": True, "points": points}
        scores = dict.fromkeys(("unguided", "guided", "ceiling"), scores)
        same = {key: {"same": dict.fromkeys(map(str, ALPHAS), 1.0), "distance": 0.5} for key in scores}
        record = {"position": number, "prompt": "a", "seconds": {"unguided": 1.0, "guided": 2.0}}
        record |= {"judges": {"a": scores, "b": scores}, "agreement": {"b": same}}
        (folder / "samples" / f"{number:05d}.json").write_text(json.dumps(record))


def read_evaluated(folder: Path) -> Any:
    places = [folder / "samples" / f"{number:05d}" for number in range(2)]
    records = [read_record(place.with_suffix(".json"), i, ALPHAS, ["a", "b"]) for i, place in enumerate(places)]
    images = [pixels(open_saved(place.with_name(f"{place.name}-guided.png"), (8, 8))) for place in places]
    return records, images, errors(folder)


def make_runs(folder: Path) -> None:
    for number in range(2):
        run = folder / f"run-{number}"
        for name in (".hydra", "csv/version_0", "head"):
            (run / name).mkdir(parents=True)
        words = ["+sweep=a", f"seed={number}", "guidance.start=0.5"]
        (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
        means = {name: {"mean": 0.5, "sem": 0.1} for name in ("unguided", "guided", "ceiling")}
        scores = {"pck": dict.fromkeys(("0.1", "0.2"), means), "confidence": means}
        results = {"judges": {"a": scores, "b": scores}, "images": 32}
        (run / "results.json").write_text(json.dumps(results))
        (run / "head" / "head.json").write_text("{}")
        lines = ["step,train/loss,val/pck@0.1_t50,val/pck@0.1_t600", "1,0.5,,", f"2,,0.{number + 1},0.25"]
        (run / "csv/version_0/metrics.csv").write_text("\n".join(lines) + "\n")


def read_runs(folder: Path) -> tuple[str, str]:
    return evaluation_table(folder), training_table(folder)


def make_pipeline(folder: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "rg/models/marionette/tokenizer")
    families.build("sd15", tokenizer).save_pretrained(folder)


def read_pipeline(folder: Path) -> Any:
    pipe = DiffusionBackbone.from_pretrained(str(folder)).pipeline
    networks = [weights(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    return networks, str(pipe.scheduler.config), pipe.tokenizer("a person in a red shirt").input_ids


def make_edit_words(folder: Path) -> None:
    words = {"drag": [[1, 2, 3.5, 4], [5, 6, 7, 8]], "boxes": [[0, 0, 16, 16], [8, 8, 32, 32]]}
    words["terms"] = [{"head": "appearance", "weight": 1.0}, "identity"]
    (folder / "words.json").write_text(json.dumps(words))


def read_edit_words(folder: Path) -> Any:
    words = validate(dict[str, Any], read_json(folder / "words.json"), "words.json")
    cfg = OmegaConf.create({"drag": None, "boxes": None, "terms": ["a"], **words})
    check(cfg)
    frame = Frame(SIZE, (64, 64))
    return parse_drag(cfg.drag, frame), parse_boxes(cfg.boxes, frame), parse_terms(cfg.terms)


def read_network(network: type[KeypointDetector | PoseTransformer | AttributeClassifier]) -> Callable[[Path], Any]:
    return lambda folder: weights(network.from_pretrained(folder))


FILES = {
    **{f"image {ending}": image_kind(ending) for ending in ("png", "jpg", "webp", "bmp", "tiff")},
    "mask": Kind(make_mask, read_mask),
    "folder of images": Kind(make_folders, read_folders, weight=4),
    "control": Kind(make_control, lambda folder: load_control(folder / "control.json", SIZE), weight=1.5),
    "head": Kind(make_head, lambda folder: weights(load_head(folder)), named=("head.", "head="), weight=2),
    "detector": Kind(make_detector, read_network(KeypointDetector), named=("model.safetensors",), weight=1.5),
    "transformer": Kind(make_transformer, read_network(PoseTransformer), named=("model.safetensors",), weight=1.5),
    "classifier": Kind(make_classifier, read_network(AttributeClassifier), named=("model.safetensors",), weight=1.5),
    "shards": Kind(make_samples, lambda folder: vars(read_shards(folder)), weight=4),
    "shards of groups": Kind(make_groups, lambda folder: vars(read_shards(folder)), weight=3),
    "checkpoint": Kind(make_checkpoints, read_checkpoints, weight=2),
    "released head": Kind(make_released, lambda folder: weights(released.load(folder / "head.pt")), weight=2),
    "evaluated images": Kind(make_evaluated, read_evaluated, weight=2),
    "results of runs": Kind(make_runs, read_runs, named=("run-",), weight=2),
    "pipeline": Kind(make_pipeline, read_pipeline, named=("backbone",), weight=3),
    "words of an edit": Kind(make_edit_words, read_edit_words, named=("drag", "boxes", "terms"), weight=1.5),
}
