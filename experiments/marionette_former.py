"""Measures the embedded model that the present one replaced, in the world that it was trained for.

The files are copied into a checkout of the last commit that held both, and run there (12 minutes of 2 idle cores):

git worktree add /tmp/former 9bb06e4
cp experiments/card_sampling.py experiments/card_scores.py experiments/marionette_former.py /tmp/former/experiments/
cd /tmp/former && python -m experiments.marionette_former
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from tqdm import tqdm, trange

from data_prep.marionette import COLORS, GROUNDS, KINDS, SKIES, Stills, render
from experiments.card_sampling import latency, model_id, reconstruct, sample
from experiments.card_scores import distances, psnr, share, whole
from experiments.detector_pictures import from_bytes
from rg.backbone import DiffusionBackbone
from rg.detectors import Detection, KeypointDetector
from rg.evaluation import write_text
from rg.points import KEYPOINTS
from rg.runs import quiet_libraries

COMMIT = "9bb06e4"
COMMAND = "python -m experiments.marionette_former"
COUNT, STEPS, SCALES, BATCH, THREADS = 512, 30, (1.0, 2.0), 32, 2
SEED = 6007  # of no data set and no training
LEAST, WHOLE = 0.5, 16  # a person is whole with this many keypoints of this confidence
READ_TRAIN, READ_STEPS = 6000, 3000
CLASSES = {
    "shirt": list(COLORS),
    "trousers": list(COLORS),
    "hat": ["none", *COLORS],
    "ground": list(GROUNDS),
    "sky": list(SKIES),
}
OUTPUT = Path("outputs/marionette_former")


def stills(split: int, count: int, kinds: dict[str, float] = KINDS) -> Stills:
    """The first renders of a split that no training has seen."""
    return render([(SEED, split, i) for i in range(count)], kinds=kinds)


def detect(detector: KeypointDetector, images: Tensor) -> Detection:
    """The detector's word on pictures (N, 3, H, W) uint8."""
    found = [detector.detect(from_bytes(chunk)) for chunk in tqdm(images.split(250), desc="detector")]
    return Detection(*(torch.cat(column) for column in zip(*found, strict=True)))


def colors_at(images: Tensor, points: Tensor) -> Tensor:
    """Colours -1..1 at places relative to the body, and of the background: (N, 60).

    Places are on trunk, upper arms, thighs, shins, above the head, along the upper border and on the lower corners.

    Args:
        images: (N, 3, H, W) uint8.
        points: (N, 18, 2) detected keypoints in pixels.
    """
    p = {name: points[:, i] for i, name in enumerate(KEYPOINTS)}
    hips, sides = (p["left_hip"] + p["right_hip"]) / 2, ("left", "right")
    head = (p["left_ear"] + p["right_ear"] + p["nose"]) / 3
    body = [hips.lerp(p["neck"], f) for f in (0.3, 0.55, 0.8)]
    for start, end in (("shoulder", "elbow"), ("hip", "knee"), ("knee", "ankle")):
        body += [p[f"{side}_{start}"].lerp(p[f"{side}_{end}"], 0.5) for side in sides]
    body += [p["neck"].lerp(head, f) for f in (1.3, 1.55, 1.8)]
    size = images.shape[-1]
    fixed = [(x * size, y * size) for y in (0.02, 0.97, 0.8) for x in ((0.03, 0.34, 0.66, 0.97) if y < 0.5 else (0, 1))]
    fixed_points = torch.tensor(fixed).expand(len(points), -1, -1)
    where = torch.cat([torch.stack(body, 1), fixed_points], 1)
    grid = (where + 0.5) / size * 2 - 1
    colors = F.grid_sample(from_bytes(images), grid[:, None], padding_mode="border", align_corners=False)
    return colors.flatten(1)


def truths(scenes: Stills) -> dict[str, Tensor]:
    """Class numbers (N,) of every attribute of scenes with one person."""
    words: dict[str, list[str]] = {name: [] for name in CLASSES}
    for prompt, people in zip(scenes.prompt, scenes.identity, strict=True):
        place = prompt.split()
        here = {"shirt": people[0]["shirt"], "trousers": people[0]["trousers"], "hat": people[0]["hat"] or "none"}
        for name, word in {**here, "ground": place[place.index("on") + 1], "sky": place[-1]}.items():
            words[name].append(word)
    return {name: torch.tensor([CLASSES[name].index(word) for word in words[name]]) for name in CLASSES}


def train_reader(features: Tensor, truth: dict[str, Tensor]) -> Any:
    """A small network from colours to classes: (N, 60) -> attribute -> class numbers (N,)."""
    torch.manual_seed(SEED)
    sizes = [len(classes) for classes in CLASSES.values()]
    net = torch.nn.Sequential(
        torch.nn.Linear(features.shape[1], 256), torch.nn.SiLU(), torch.nn.Linear(256, 256), torch.nn.SiLU(),
        torch.nn.Linear(256, sum(sizes)),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, READ_STEPS)
    generator = Generator().manual_seed(SEED)
    for _ in trange(READ_STEPS, desc="colour reader"):
        chosen = torch.randint(len(features), (256,), generator=generator)
        x = features[chosen] + 0.03 * torch.randn(256, features.shape[1], generator=generator)
        scores = net(x).split(sizes, 1)
        loss = sum(F.cross_entropy(s, truth[name][chosen]) for name, s in zip(CLASSES, scores, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def read(x: Tensor) -> dict[str, Tensor]:
        return {name: s.argmax(1) for name, s in zip(CLASSES, net(x).split(sizes, 1), strict=True)}

    return read


def main() -> None:
    """Measures everything and writes outputs/marionette_former/results.json."""
    quiet_libraries()
    torch.set_num_threads(THREADS)
    backbone, detector = DiffusionBackbone.from_pretrained("marionette"), KeypointDetector.from_pretrained("detector")
    scenes, sets = stills(0, COUNT), {}
    for scale in SCALES:
        arguments = {"num_inference_steps": STEPS, "guidance_scale": scale, "batch_size": BATCH, "name": f"{scale:g}"}
        seeds = [SEED * 1_000_003 + i for i in range(COUNT)]
        sets[f"scale {scale:g}"] = sample(backbone, scenes.prompt, seeds, OUTPUT, **arguments)
    reference, one = stills(1, COUNT), torch.tensor([kind == "one" for kind in scenes.kind])
    sets["ceiling"], drawn = reconstruct(backbone, scenes.image, SEED)
    found = {name: detect(detector, images[one]) for name, images in sets.items()}

    known = stills(2, READ_TRAIN, {"one": 1.0})
    known.image[::2] = reconstruct(backbone, known.image[::2], SEED)[0]
    read = train_reader(colors_at(known.image, detect(detector, known.image).points), truths(known))
    truth = truths(Stills(**{k: _choose(v, one) for k, v in vars(scenes).items()}))
    fidelity = {}
    for name, images in sets.items():
        seen = read(colors_at(images[one], found[name].points))
        fidelity[name] = {k: share(int((seen[k] == truth[k]).sum()), len(truth[k])) for k in CLASSES}

    weights = [p for m in (backbone.vae, backbone.pipeline.text_encoder, backbone.denoiser) for p in m.parameters()]
    results = {
        "command": COMMAND,
        "commit": COMMIT,
        "model": model_id(backbone),
        "samples": COUNT,
        "steps": STEPS,
        "psnr": {"mean": psnr(sets["ceiling"], scenes.image), "sampled": psnr(drawn, scenes.image)},
        "kernel_distance": distances(sets, reference.image, lambda images: _embed(detector, images)),
        "whole_person": {
            name: share(int((whole(f.confidence, least=LEAST, keypoints=WHOLE) & f.present).sum()), len(f.points))
            for name, f in found.items()
        },
        "whole_person_means": {"confidence": LEAST, "keypoints": WHOLE},
        "keypoints_confident": {
            name: torch.bincount((f.confidence >= LEAST).sum(1), minlength=19).tolist() for name, f in found.items()
        },
        "fidelity": fidelity,
        "parameters": sum(p.numel() for p in weights),
        "latency": [
            latency(backbone, scenes.prompt[:16], repeats=2, num_inference_steps=50, guidance_scale=s) for s in SCALES
        ],
    }
    write_text(OUTPUT / "results.json", results)
    print(json.dumps(results, indent=1))


def _choose(column: Any, chosen: Tensor) -> Any:
    return column[chosen] if isinstance(column, Tensor) else [x for x, c in zip(column, chosen, strict=True) if c]


def _embed(detector: KeypointDetector, images: Tensor) -> Tensor:
    return torch.cat([detector.embed(from_bytes(chunk)) for chunk in images.split(250)])


if __name__ == "__main__":
    main()
