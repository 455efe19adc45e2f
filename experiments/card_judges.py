"""What the detector and the classifier say of pictures, for the model card."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from experiments.card_scores import share, whole
from experiments.judge_pictures import from_bytes
from rg.classifier import AttributeClassifier
from rg.detectors import Detection, KeypointDetector

CHUNK = 100


class Judges:
    """The shipped judges, or those in the folders given, on pictures (N, 3, H, W) uint8."""

    def __init__(self, detector: str, classifier: str, *, device: str | torch.device) -> None:
        self.device = device
        self.detector = KeypointDetector.from_pretrained(detector, device=device)
        self.classifier = AttributeClassifier.from_pretrained(classifier, device=device)

    def read(self, images: Tensor) -> list[dict[str, str]]:
        """The classifier's word: of each picture attribute -> class."""
        return [*chain.from_iterable(self.classifier.read(chunk) for chunk in self._chunks(images))]

    def embed(self, images: Tensor) -> Tensor:
        """The detector's features, for the kernel distance: (N, D)."""
        return torch.cat([self.detector.embed(chunk).cpu() for chunk in self._chunks(images)])

    def detect(self, images: Tensor, people: int) -> Detection:
        """Up to so many people in each picture."""
        found = [self.detector.detect(chunk, people) for chunk in self._chunks(images)]
        return Detection(*(torch.cat(column).cpu() for column in zip(*found, strict=True)))

    def people_found(self, images: Tensor, kinds: Sequence[str], *, least: float, keypoints: int) -> dict[str, Any]:
        """How often all people are found, and found whole, in pictures of one person and in pictures of two.

        "confident" says in how many pictures the least sure person has 0, 1, ..., 18 confident keypoints.

        Args:
            images: (N, 3, H, W) uint8.
            kinds: of each picture what its prompt asks for; others than "one" and "two" are left out.
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
