"""Measures the embedded model and writes its card, results and contact sheet: python -m experiments.marionette_card"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, get_num_threads, set_num_threads
from tqdm import tqdm

from data_prep.marionette import Stills
from data_prep.marionette.scene import Scene
from experiments.card_judges import Judges
from experiments.card_sampling import latency, model_id, reconstruct, sample
from experiments.card_scenes import CHANGED, held_out, recolored_pairs, render_chunks
from experiments.card_scores import both, distances, fidelity, flips, psnr
from experiments.card_text import card_text, contact_sheet
from rg.backbone import DiffusionBackbone
from rg.evaluation import write_text
from rg.models import locate
from rg.runs import clear_errors


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
        self.judges = Judges(settings["detector"], settings["classifier"], device=self.backbone.device)

    def results(self) -> tuple[dict[str, Any], Tensor]:
        """Everything that the card tells, and the pictures of the contact sheet."""
        cfg = self.settings
        scenes = self.scenes("samples", cfg["images"])
        figures, sets = self.main_figures(scenes)
        figures |= {"unseen_pairs": self.unseen_pairs(), "changed_words": self.changed_words()}
        figures["latency"] = self.latencies(scenes.prompt)
        pipeline = self.backbone.pipeline
        modules = {"autoencoder": pipeline.vae, "text_encoder": pipeline.text_encoder, "unet": pipeline.unet}
        figures["parameters"] = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
        sheet = sets[f"scale {self.scale:g}"][: cfg["sheet_images"]]
        return {"model": model_id(self.backbone), **figures, "sheet": scenes.prompt[: len(sheet)]}, sheet

    def main_figures(self, scenes: Stills) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Autoencoder, distances, people and fidelity, and the sets of pictures that they are of."""
        sets = {f"scale {s:g}": self.sample(f"scale_{s:g}", scenes.prompt, s) for s in self.settings["scales"]}
        sets["ceiling"], drawn = reconstruct(self.backbone, scenes.image, self.seed)
        reference = self.scenes("reference", self.settings["images"]).image
        figures: dict[str, Any] = {
            "psnr": {"mean": psnr(sets["ceiling"], scenes.image), "sampled": psnr(drawn, scenes.image)},
            "kernel_distance": distances(sets, reference, self.judges.embed, self.settings["parts"]),
            "people_found": {},
            "fidelity": {},
        }
        for name, images in tqdm(sets.items(), desc="judging"):
            figures["people_found"][name] = self.judges.people_found(images, scenes.kind, **self.settings["whole"])
            figures["fidelity"][name] = fidelity(self.judges.read(images), scenes.attributes, scenes.prompt)
        return figures, sets

    def unseen_pairs(self) -> dict[str, Any]:
        """Fidelity where shirt and trousers are of colours that are never together in training."""
        scenes = self.scenes("unseen", self.settings["unseen"], kinds={"one": 1.0}, pairs="unseen")
        sets = {
            "samples": self.sample("unseen", scenes.prompt, self.scale),
            "ceiling": reconstruct(self.backbone, scenes.image, self.seed)[0],
        }
        result: dict[str, Any] = {}
        for name, images in sets.items():
            read = self.judges.read(images)
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
                    self.judges.read(self.pictures(source, s, pairs.indices)) for s in (pairs.before, pairs.after)
                )
                result[name][source] = flips(before, after, truth, words, name)
        return result

    def latencies(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """Seconds per image at each scale, on the device and with the threads that the settings name."""
        settings = dict(self.settings["latency"])
        device, threads, chosen = settings.pop("device"), settings.pop("threads"), prompts[: settings.pop("images")]
        backbone, before = DiffusionBackbone.from_pretrained(self.settings["model"], device=device), get_num_threads()
        set_num_threads(threads)
        try:
            found = [latency(backbone, chosen, guidance_scale=s, **settings) for s in self.settings["scales"]]
        finally:
            set_num_threads(before)
        return [{**entry, "device": device} for entry in found]

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


def read_json(path: str | None) -> dict[str, Any] | None:
    """A JSON file; None where there is none."""
    return json.loads(Path(path).read_text()) if path and Path(path).is_file() else None


def run(settings: Mapping[str, Any], command: str) -> str:
    """Measures the model, writes results, contact sheet and card, and returns the card.

    Args:
        settings: as of conf/marionette_card.yaml, plain values.
        command: what the card says it was made by.
    """
    results, sheet = Card(settings).results()
    size = sum(path.stat().st_size for path in locate(settings["model"]).rglob("*.safetensors")) / 1e6
    results = {"command": command, "megabytes": size, **results, "settings": dict(settings)}
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
    command = shlex.join(["python", "-m", "experiments.marionette_card", *sys.argv[1:]])
    print(run(OmegaConf.to_container(cfg, resolve=True), command))


if __name__ == "__main__":
    main()
