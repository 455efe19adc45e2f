"""Measures the embedded model: card, results, contact sheet; python -m experiments.marionette.card.measure"""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.random import SeedSequence, default_rng
from omegaconf import DictConfig, OmegaConf
from torch import Generator, Tensor, get_num_threads, set_num_threads
from tqdm import tqdm, trange

from data_prep.marionette.render import Stills, render, render_scenes
from data_prep.marionette.scene import Scene
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.vocabulary import COLORS, HAIRS, UNSEEN_PAIRS
from experiments.marionette.card.scores import both, distances, fidelity, flips, psnr, share, whole
from experiments.marionette.card.text import card_text, contact_sheet
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import command
from rg.detectors.attributes import AttributeClassifier
from rg.detectors.detection import Detection
from rg.detectors.keypoints import KeypointDetector
from rg.generation import generate, image_seeds
from rg.io.files import atomic, read_json, write_json, write_text
from rg.io.images import from_bytes, to_bytes
from rg.models import locate


class Card:
    """The embedded model, its judges, and every figure of the card.

    Args:
        settings: as of conf/experiments/marionette_card.yaml.

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
        """Everything that the card tells, and the images of the contact sheet."""
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
        """Autoencoder, distances, people and fidelity, and the sets of images that they are of."""
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
                    self.judges.read(self.images(source, s, pairs.indices)) for s in (pairs.before, pairs.after)
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

    def images(self, source: str, scenes: Sequence[Scene], indices: Sequence[int]) -> Tensor:
        """Samples of the prompts of scenes, or ("ceiling") their renders through the autoencoder."""
        if source == "samples":
            return self.sample("changed", [scene.prompt for scene in scenes], self.scale, indices)
        return reconstruct(self.backbone, render_chunks(scenes, self.backbone.resolution[0]), self.seed)[0]

    def scenes(self, split: str, count: int, **arguments: Any) -> Stills:
        """Renders of scenes that nothing was trained on, at the model's resolution."""
        return held_out(self.seed, split, count, resolution=self.backbone.resolution[0], **arguments)

    def sample(self, name: str, prompts: Sequence[str], scale: float, indices: Sequence[int] | None = None) -> Tensor:
        """Samples prompts (N, 3, H, W) uint8; equal indices, by default 0, 1, ..., begin with equal noise."""
        seeds = image_seeds(self.seed, range(len(prompts)) if indices is None else indices)
        arguments = {**self.settings["sampling"], "batch_size": self.settings["batch_size"], "guidance_scale": scale}
        return sample(self.backbone, prompts, seeds, Path(self.settings["folder"]) / "samples", name=name, **arguments)


def run(settings: Mapping[str, Any], command: str) -> str:
    """Measures the model, writes results, contact sheet and card, and returns the card.

    Args:
        settings: as of conf/experiments/marionette_card.yaml, plain values.
        command: what the card says it was made by.
    """
    results, sheet = Card(settings).results()
    size = sum(path.stat().st_size for path in locate(settings["model"]).rglob("*.safetensors")) / 1e6
    results = {"command": command, "megabytes": size, **results, "settings": dict(settings)}
    record = settings["record"]
    results["training"] = read_json(Path(record), constants=True) if record and Path(record).is_file() else None
    write_json(Path(settings["results"]), results)
    contact_sheet(sheet, Path(settings["sheet"]))
    text = card_text(results)
    write_text(Path(settings["card"]), text)
    return text


@command("experiments/marionette_card")
def main(cfg: DictConfig) -> None:
    """Makes the card with the settings of the command line and prints it."""
    command_line = shlex.join(["python", "-m", "experiments.marionette.card.measure", *sys.argv[1:]])
    print(run(OmegaConf.to_container(cfg, resolve=True), command_line))


if __name__ == "__main__":
    main()


class Judges:
    """The shipped judges, or those in the folders given, on images (N, 3, H, W) uint8."""

    def __init__(self, detector: str, classifier: str, *, device: str | torch.device) -> None:
        self.device = device
        self.detector = KeypointDetector.from_pretrained(detector, device=device)
        self.classifier = AttributeClassifier.from_pretrained(classifier, device=device)

    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The classifier's word: of each image attribute -> class."""
        return [*chain.from_iterable(self.classifier.read(chunk) for chunk in self._chunks(images))]

    def embed(self, images: Tensor) -> Tensor:
        """The detector's features, for the kernel distance: (N, D)."""
        return torch.cat([self.detector.embed(chunk).cpu() for chunk in self._chunks(images)])

    def detect(self, images: Tensor, people: int) -> Detection:
        """Up to so many people in each image."""
        found = [self.detector.detect(chunk, people) for chunk in self._chunks(images)]
        return Detection(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))

    def people_found(self, images: Tensor, kinds: Sequence[str], *, least: float, keypoints: int) -> dict[str, Any]:
        """How often all people are found, and found whole, in images of one person and in images of two.

        "confident" says in how many images the least sure person has 0, 1, ..., 18 confident keypoints.

        Args:
            images: (N, 3, H, W) uint8.
            kinds: of each image what its prompt asks for; others than "one" and "two" are left out.
            least, keypoints: who is whole, see `whole`.
        """
        result = {}
        for people, kind in enumerate(("one", "two"), 1):
            chosen = torch.tensor([k == kind for k in kinds])
            if not chosen.any():
                continue
            found = self.detect(images[chosen], people)
            entire = found.present & whole(found.confidence, least=least, keypoints=keypoints)
            hits = {"found": found.present, "whole": entire}
            result[kind] = {key: share(int(hit.all(1).sum()), int(chosen.sum())) for key, hit in hits.items()}
            confident = (found.confidence >= least).sum(-1).amin(1)
            result[kind]["confident"] = torch.bincount(confident, minlength=19).tolist()
        return result

    def _chunks(self, images: Tensor) -> list[Tensor]:
        return [from_bytes(chunk).to(self.device) for chunk in images.split(CHUNK)]


CHUNK = 100


def model_id(backbone: DiffusionBackbone) -> str:
    """16 hexadecimal digits that name the weights of autoencoder, text encoder and U-Net."""
    digest = hashlib.sha256()
    for module in (backbone.vae, backbone.pipeline.text_encoder, backbone.denoiser):
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sample(
    backbone: DiffusionBackbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    *,
    name: str,
    batch_size: int,
    **arguments: Any,
) -> Tensor:
    """Samples one image per prompt and seed: (N, 3, H, W) uint8.

    Every batch is a file in `<folder>/<name>`, called after a hash of all that it depends on: a broken run goes on
    where it stopped, a longer one takes up what a shorter one made.

    Args:
        name: of the set of images, for people to read.
        arguments: the pipeline's own, such as num_inference_steps and guidance_scale.
    """
    model, parts = model_id(backbone), []
    (folder / name).mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(prompts), desc=f"sampling {name}", unit="image") as bar:
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            batch = {"prompts": list(prompts[chosen]), "seeds": list(seeds[chosen])}
            text = json.dumps({"model": model, **arguments, **batch}, sort_keys=True)
            path = folder / name / f"{start:05d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.npz"
            if not path.is_file():
                images = generate(backbone.pipeline, **batch, **arguments)
                with atomic(path) as temporary, temporary.open("wb") as file:
                    np.savez(file, image=to_bytes(images).numpy())
            with np.load(path, allow_pickle=False) as stored:
                parts.append(torch.from_numpy(stored["image"]))
            bar.update(len(parts[-1]))
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(backbone: DiffusionBackbone, images: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) uint8 decoded from the mean of their latents, and from a sample of them: uint8 both."""
    generator = Generator().manual_seed(seed)
    means, samples = [], []
    for chunk in tqdm(images.split(CHUNK), desc="autoencoder", unit_scale=CHUNK):
        mean, std = (x.cpu() for x in backbone.encode(from_bytes(chunk)))
        means.append(to_bytes(backbone.decode(mean)))
        samples.append(to_bytes(backbone.decode(mean + std * torch.randn(mean.shape, generator=generator))))
    return torch.cat(means), torch.cat(samples)


def latency(
    backbone: DiffusionBackbone, prompts: Sequence[str], *, repeats: int = 3, **arguments: Any
) -> dict[str, float]:
    """Seconds per image of one batch, the fastest of `repeats` (a shared machine only ever adds time).

    Returns:
        {"seconds_per_image", "cpu_seconds_per_image" (of all threads), "batch_size", "threads", and the arguments}.
    """
    times, cpu_times = [], []
    for _ in range(repeats):
        begin, cpu = time.perf_counter(), time.process_time()
        generate(backbone.pipeline, prompts, seeds=range(len(prompts)), **arguments)
        times.append(time.perf_counter() - begin)
        cpu_times.append(time.process_time() - cpu)
    count = len(prompts)
    seconds = {"seconds_per_image": min(times) / count, "cpu_seconds_per_image": min(cpu_times) / count}
    return {**seconds, "batch_size": count, "threads": torch.get_num_threads(), **arguments}


SPLITS = {"samples": 0, "reference": 1, "unseen": 2, "changed": 3}
# What a word may be changed in, and to.
CHANGED: dict[str, tuple[str, ...]] = {name: tuple(COLORS) for name in ("shirt", "trousers", "hat")}
CHANGED["hair"] = tuple(HAIRS)


class Pairs(NamedTuple):
    """N scenes of one person, the same with one colour changed, and the number of each scene in its split."""

    before: list[Scene]
    after: list[Scene]
    indices: list[int]


def held_out(seed: int, split: str, count: int, *, resolution: int, **arguments: Any) -> Stills:
    """The first renders of a split; further arguments as of `render`."""
    seeds = [(seed, SPLITS[split], i) for i in range(count)]
    starts = trange(0, count, CHUNK, desc=f"rendering {split}", unit_scale=CHUNK)
    return Stills.join([render(seeds[i : i + CHUNK], resolution=resolution, **arguments) for i in starts])


def render_chunks(scenes: Sequence[Scene], resolution: int) -> Tensor:
    """Renders of given scenes: (N, 3, H, W) uint8."""
    starts = range(0, len(scenes), 8)
    return torch.cat([render_scenes(scenes[i : i + 8], resolution=resolution, supersampling=2).image for i in starts])


def recolored_pairs(seed: int, name: str, count: int) -> Pairs:
    """The first `count` scenes of one person whose prompt tells the colour of `name`, and the same recoloured."""
    pairs, index = Pairs([], [], []), 0
    while len(pairs.indices) < count:
        entropy = (seed, SPLITS["changed"], index)
        scene = draw_scene(entropy, {"one": 1.0})
        changed = recolor(scene, name, default_rng(SeedSequence((*entropy, list(CHANGED).index(name)))))
        if changed is not None:
            for column, value in zip(pairs, (scene, changed, index), strict=True):
                column.append(value)
        index += 1
    return pairs


def recolor(scene: Scene, name: str, rng: np.random.Generator) -> Scene | None:
    """The scene with another colour for attribute `name` of its first person; None where its prompt tells none.

    Shirt and trousers do not become a pair that training leaves out.
    """
    person = scene.people[0]
    if not person.identity[name] or (name == "hair" and not person.names_hair):
        return None
    choices = [{**person.identity, name: word} for word in CHANGED[name] if word != person.identity[name]]
    choices = [identity for identity in choices if not is_unseen(identity)]
    identity = choices[rng.integers(len(choices))]
    return replace(scene, people=(replace(person, identity=identity), *scene.people[1:]))


def is_unseen(identity: Mapping[str, Any]) -> bool:
    """Whether shirt and trousers are of colours that are never together in training."""
    return UNSEEN_PAIRS[identity["shirt"]] == identity["trousers"]
