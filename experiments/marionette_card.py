"""Measures the embedded model and writes its card, results and contact sheet: python -m experiments.marionette_card"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from data_prep.marionette import Stills
from data_prep.marionette.scene import Scene
from experiments.card_sampling import latency, model_id, reconstruct, sample
from experiments.card_scenes import CHANGED, held_out, recolored_pairs, render_chunks
from experiments.card_scores import both, distances, fidelity, flips, psnr, share, whole
from experiments.card_text import card_text, contact_sheet
from experiments.judge_pictures import from_bytes
from rg.backbone import DiffusionBackbone
from rg.classifier import AttributeClassifier
from rg.detectors import Detection, KeypointDetector
from rg.evaluation import write_text
from rg.models import locate
from rg.runs import clear_errors

CHUNK = 100


class Card:
    """The embedded model, its judges, and every figure of the card.

    Args:
        settings: as of conf/marionette_card.yaml.

    Raises:
        ValueError: the scale is not among the scales.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings["scale"] not in settings["scales"]:
            raise ValueError(f"scale: expected one of {settings['scales']}, got {settings['scale']}: change `scale`")
        self.settings, self.seed, self.scale = settings, settings["seed"], settings["scale"]
        self.backbone = DiffusionBackbone.from_pretrained(settings["model"], device=settings["device"])
        device = self.backbone.device
        self.detector = KeypointDetector.from_pretrained(settings["detector"], device=device)
        self.classifier = AttributeClassifier.from_pretrained(settings["classifier"], device=device)

    def results(self) -> tuple[dict[str, Any], Tensor]:
        """Everything that the card tells, and the pictures of the contact sheet."""
        cfg, timing = self.settings, dict(self.settings["latency"])
        scenes = self.scenes("samples", cfg["images"])
        figures, sets = self.main_figures(scenes)
        figures |= {"unseen_pairs": self.unseen_pairs(), "changed_words": self.changed_words()}
        prompts = scenes.prompt[: timing.pop("images")]
        figures["latency"] = [latency(self.backbone, prompts, guidance_scale=s, **timing) for s in cfg["scales"]]
        pipeline = self.backbone.pipeline
        modules = {"autoencoder": pipeline.vae, "text_encoder": pipeline.text_encoder, "unet": pipeline.unet}
        figures["parameters"] = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        figures["device"] = str(self.backbone.device)
        sheet = sets[f"scale {self.scale:g}"][: cfg["sheet_images"]]
        return {"model": model_id(self.backbone), **figures, "sheet": scenes.prompt[: len(sheet)]}, sheet

    def main_figures(self, scenes: Stills) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Autoencoder, distances, people and fidelity, and the sets of pictures that they are of."""
        sets = {f"scale {s:g}": self.sample(f"scale_{s:g}", scenes.prompt, s) for s in self.settings["scales"]}
        sets["ceiling"], drawn = reconstruct(self.backbone, scenes.image, self.seed)
        reference = self.scenes("reference", self.settings["images"]).image
        figures: dict[str, Any] = {
            "psnr": {"mean": psnr(sets["ceiling"], scenes.image), "sampled": psnr(drawn, scenes.image)},
            "kernel_distance": distances(sets, reference, self.embed, self.settings["parts"]),
            "people_found": {},
            "fidelity": {},
        }
        for name, images in tqdm(sets.items(), desc="judging"):
            figures["people_found"][name] = self.people_found(images, scenes.kind)
            figures["fidelity"][name] = fidelity(self.read(images), scenes.attributes, scenes.prompt)
        return figures, sets

    def people_found(self, images: Tensor, kinds: Sequence[str]) -> dict[str, Any]:
        """How often all people are found, and found whole, in pictures of one person and in pictures of two."""
        result = {}
        for people, kind in enumerate(("one", "two"), 1):
            chosen = torch.tensor([k == kind for k in kinds])
            if not chosen.any():
                continue
            found = self.detect(images[chosen], people)
            entire = found.present & whole(found.confidence, **self.settings["whole"])
            hits = {"found": found.present, "whole": entire}
            result[kind] = {key: share(int(hit.all(1).sum()), int(chosen.sum())) for key, hit in hits.items()}
        return result

    def unseen_pairs(self) -> dict[str, Any]:
        """Fidelity where shirt and trousers are of colours that are never together in training."""
        scenes = self.scenes("unseen", self.settings["unseen"], kinds={"one": 1.0}, pairs="unseen")
        sets = {
            "samples": self.sample("unseen", scenes.prompt, self.scale),
            "ceiling": reconstruct(self.backbone, scenes.image, self.seed)[0],
        }
        result: dict[str, Any] = {}
        for name, images in sets.items():
            read = self.read(images)
            right = fidelity(read, scenes.attributes, scenes.prompt)["alone"]
            result[name] = {**right, "pair": both(read, scenes.attributes)}
        return result

    def changed_words(self) -> dict[str, Any]:
        """What changes, by the classifier's word, with one colour word of the prompt at a fixed seed."""
        result: dict[str, Any] = {}
        for name in CHANGED:
            pairs = recolored_pairs(self.seed, name, self.settings["changed"])
            truth, words = [s.attributes for s in pairs.before], [s.attributes[name] for s in pairs.after]
            result[name] = {}
            for source in ("samples", "ceiling"):
                before, after = (
                    self.read(self.pictures(source, s, pairs.indices)) for s in (pairs.before, pairs.after)
                )
                result[name][source] = flips(before, after, truth, words, name)
        return result

    def pictures(self, source: str, scenes: Sequence[Scene], indices: Sequence[int]) -> Tensor:
        """Samples of the prompts of scenes, or ("ceiling") their renders through the autoencoder."""
        if source == "samples":
            return self.sample("changed", [scene.prompt for scene in scenes], self.scale, indices)
        return reconstruct(self.backbone, render_chunks(scenes, self.backbone.resolution[0]), self.seed)[0]

    def scenes(self, split: str, count: int, **arguments: Any) -> Stills:
        """Renders of scenes that nothing was trained on, at the model's resolution."""
        return held_out(self.seed, split, count, resolution=self.backbone.resolution[0], **arguments)

    def sample(self, name: str, prompts: Sequence[str], scale: float, indices: Sequence[int] | None = None) -> Tensor:
        """Samples prompts (N, 3, H, W) uint8; equal indices, by default 0, 1, ..., begin with equal noise."""
        seeds = [self.seed * 1_000_003 + i for i in (range(len(prompts)) if indices is None else indices)]
        arguments = {**self.settings["sampling"], "batch_size": self.settings["batch_size"], "guidance_scale": scale}
        return sample(self.backbone, prompts, seeds, Path(self.settings["folder"]) / "samples", name=name, **arguments)

    def detect(self, images: Tensor, people: int) -> Detection:
        """The detector's word on pictures (N, 3, H, W) uint8."""
        found = [self.detector.detect(chunk, people) for chunk in self.chunks(images)]
        return Detection(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))

    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The classifier's word on pictures (N, 3, H, W) uint8: of each, attribute -> class."""
        return [*chain.from_iterable(self.classifier.read(chunk) for chunk in self.chunks(images))]

    def embed(self, images: Tensor) -> Tensor:
        """The detector's features of pictures (N, 3, H, W) uint8, for the kernel distance."""
        return torch.cat([self.detector.embed(chunk).cpu() for chunk in self.chunks(images)])

    def chunks(self, images: Tensor) -> list[Tensor]:
        """Pictures as the judges take them, some at a time."""
        return [from_bytes(chunk).to(self.backbone.device) for chunk in images.split(CHUNK)]


def read_json(path: str | None) -> dict[str, Any] | None:
    """A JSON file; None where there is none."""
    return json.loads(Path(path).read_text()) if path and Path(path).is_file() else None


def command_line() -> str:
    """What was typed to run this process, if that was `python -m`."""
    spec = sys.modules["__main__"].__spec__
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def run(settings: Mapping[str, Any]) -> str:
    """Measures the model, writes results, contact sheet and card, and returns the card.

    Args:
        settings: as of conf/marionette_card.yaml, plain values.
    """
    results, sheet = Card(settings).results()
    size = sum(path.stat().st_size for path in locate(settings["model"]).rglob("*.safetensors")) / 1e6
    results = {"command": command_line(), "megabytes": size, **results, "settings": dict(settings)}
    results["training"] = read_json(settings["record"])
    write_text(Path(settings["results"]), results)
    contact_sheet(sheet, Path(settings["sheet"]))
    text = card_text(results, read_json(settings["former"]))
    write_text(Path(settings["card"]), text)
    return text


@hydra.main(version_base="1.3", config_path="../conf", config_name="marionette_card")
@clear_errors
def main(cfg: DictConfig) -> None:
    """Makes the card with the settings of the command line and prints it."""
    print(run(OmegaConf.to_container(cfg, resolve=True)))


if __name__ == "__main__":
    main()
