"""Whether other images show the same person: python -m experiments.applications.same_person

As the authors describe it to users: reference and new image are sampled unguided, a detector finds the face in both,
and the new one is sampled again from the same noise with the identity head between the two boxes. Whether it is the
same person is what a classifier reads that knows nothing of heads; the prompt says nothing of it.
"""

import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from experiments.applications.bench import Bench, Heads, check_methods, publish
from experiments.applications.drawing import draw_boxes
from rg.cli import claimed, command
from rg.detectors.detection import Detection, Detector
from rg.guidance.guidance import GuidanceTerm
from rg.guidance.targets import ReferenceTarget
from rg.points import KEYPOINTS, Size, box_cells

FACE = [KEYPOINTS.index(name) for name in ("nose", "right_eye", "left_eye", "right_ear", "left_ear")]
NECK = KEYPOINTS.index("neck")
# What one knows a person by, of what the classifier reads; clothes are the prompt's.
TRAITS = ("hair", "hair_length", "glasses", "hat")
SURE = 0.5  # confidence from which on a keypoint counts
MARGIN = 1.7  # half a box against the distance from the face's middle to the neck
GRID = 8


def face_boxes(found: Detection, size: Size) -> Tensor:
    """Square boxes (B, 4) of (left, top, right, bottom) pixels around the faces that a detector found.

    A face is as large as its middle is far from the neck. Where the detector is not sure of either, the box is all
    of the image: there is nothing to cut.
    """
    sure = found.confidence[:, 0] >= SURE
    seen = sure[:, FACE]
    middle = (found.points[:, 0, FACE] * seen[..., None]).sum(1) / seen.sum(1).clamp_min(1)[:, None]
    half = (found.points[:, 0, NECK] - middle).norm(dim=-1)[:, None] * MARGIN / 2 + 4
    boxes = torch.cat([middle - half, middle + half], 1)
    limits = torch.tensor([size[1], size[0], size[1], size[0]])
    boxes = torch.minimum(boxes.clamp_min(0), limits)
    whole = torch.tensor([0, 0, size[1], size[0]]).to(boxes).expand_as(boxes)
    usable = seen.any(1) & sure[:, NECK] & ((boxes[:, 2:] - boxes[:, :2]) >= 8).all(1)
    return torch.where(usable[:, None], boxes, whole)


class SamePerson(Bench):
    """Portraits, and the boxes of the faces in them and in what is made without guidance."""

    def __init__(self, cfg: DictConfig, run_dir: Path) -> None:
        super().__init__(cfg, run_dir, kind="portrait")
        self.finder: Detector = next(iter(self.detectors.values()))
        self.prompts = [cfg.prompt] * len(self.samples)
        self.unguided = self.make("unguided", {"heads": {}}, lambda heads, rows: [], prompts=self.prompts, rounds=1)[0]
        found = [self.finder.detect(images) for images in (self.given, self.unguided)]
        self.boxes = [face_boxes(one, self.samples.size) for one in found]

    def terms(self, heads: Heads, rows: slice) -> list[GuidanceTerm]:
        """The energies of the faces of a slice, each within its two boxes."""
        terms = []
        for head, weight in heads:
            boxes = tuple(box_cells(box[rows], self.samples.size, self.readout_size(head)) for box in self.boxes)
            terms.append(GuidanceTerm(head, ReferenceTarget(), weight, {"boxes": boxes}))
        return terms

    def score(self, images: Tensor) -> dict[str, list[float]]:
        """Of each image (B, 3, H, W): 1 where every trait is read as in the reference, the share of traits, and the
        distance of the classifier's features (1 - cosine)."""
        shares = self.attributes_kept(images, TRAITS)
        distance = 1 - F.cosine_similarity(self.classifier.embed(images), self.classifier.embed(self.given))
        scores = {"verified": (shares == 1).float(), "traits kept": shares, "appearance distance": distance}
        return {name: values.tolist() for name, values in scores.items()}


def run(cfg: DictConfig, run_dir: Path, command_line: str) -> str:
    """Makes and scores what is missing of all methods; writes results.json, table.md, grid.png; returns the table."""
    methods = check_methods(cfg.methods)
    with claimed(run_dir):
        bench = SamePerson(cfg, run_dir)
        images = {"unguided": bench.unguided} | {
            name: bench.make(name, method, bench.terms, prompts=bench.prompts, rounds=1)[0]
            for name, method in methods.items()
        }
        scores = {name: bench.score(made) for name, made in images.items()}
        grid = {"reference": draw_boxes((bench.given[:GRID] + 1) / 2, bench.boxes[0])}
        grid |= {name: draw_boxes((made[:GRID] + 1) / 2, bench.boxes[1]) for name, made in images.items()}
        compared = ["verified", "traits", "appearance"]
        marks = {"boxes": torch.stack(bench.boxes, 1).tolist()}
        return publish(bench, scores, "unguided", compared, grid, command_line, marks)


@command("experiments/same_person")
def main(cfg: DictConfig) -> None:
    """Measures every method of the configuration and prints the table."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    print(run(cfg, run_dir, shlex.join(["python", "-m", "experiments.applications.same_person", *sys.argv[1:]])))
    print(f"{run_dir}/grid.png")


if __name__ == "__main__":
    main()
