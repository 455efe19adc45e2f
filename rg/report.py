"""Scores of sampled images against the poses they were asked for, and how they are shown."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rg.detectors.keypoints import Detection, KeypointDetector
from rg.io.files import read_json
from rg.io.keypoints import Number
from rg.io.records import Record, validate
from rg.metrics.keypoints import box_side, match_people, measurable, pck
from rg.metrics.statistics import kernel_distance, paired_gain

CONDITIONS = ("unguided", "guided", "ceiling")
BOXES = ("target", "predicted")
# Below this number the kernel distance says nothing.
KERNEL_IMAGES = 256

Share = Annotated[float, Field(ge=0, le=1)]
Point = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Scores(Record):
    """What `score_images` says of one image."""

    pck: Annotated[dict[Literal["target", "predicted"], dict[str, Share | None]], Field(min_length=2)]
    confidence: Share
    present: bool
    points: list[Annotated[list[Point], Field(min_length=18, max_length=18)]]


class ImageRecord(Record):
    """What an evaluation stores of one position: its images' scores under every condition."""

    position: Annotated[int, Field(ge=0)]
    prompt: str
    seconds: Annotated[dict[Literal["unguided", "guided"], Annotated[float, Field(ge=0)]], Field(min_length=2)]
    unguided: Scores
    guided: Scores
    ceiling: Scores


def read_record(path: Path, position: int, alphas: Sequence[float]) -> dict[str, Any]:
    """Reads what an evaluation stored of one position, see ImageRecord.

    Raises:
        ValueError: the file is damaged, or of another position or other tolerances.
    """
    record = validate(ImageRecord, read_json(path), str(path)).model_dump()
    expected = (position, {*map(str, alphas)})
    for condition in CONDITIONS:
        for shares in record[condition]["pck"].values():
            if (found := (record["position"], {*shares})) != expected:
                raise ValueError(f"{path}: expected position and tolerances {expected}, found {found}")
    return record


class Mean(Record):
    """A mean over images; what stands beside it is not read again."""

    mean: Share


class Means(Record):
    """Means under every condition."""

    unguided: Mean
    guided: Mean
    ceiling: Mean


class Results(Record):
    """What of results.json is read again: PCK by alpha, confidence, number of images."""

    pck: Annotated[dict[str, Means], Field(min_length=1)]
    confidence: Means
    images: Annotated[int, Field(ge=1)]


def score_images(detected: Detection, keypoints: Tensor, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """PCK of each image, a mean over its people: {"pck": {box: {alpha: share}}, "confidence", "present", "points"}.

    Predictions are matched with the people asked for by smallest distance; "points" are in the latter's order, and
    "present" is whether all of them were found. People without two visible keypoints in different places have no size
    to measure by and are left out of "pck", which is None where an image has no others.

    Args:
        detected: the detector's poses of B images, P people each.
        keypoints: (B, P, 18, 3) of (x, y, visible), the poses asked for; a person without a visible keypoint does not
            count, and each image has one who does.

    Raises:
        ValueError: an image whose people have no visible keypoint.
    """
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    order = match_people(detected.points, target, visible, detected.present)
    rows = torch.arange(len(order), device=order.device)[:, None]
    points, confidence, present = (
        values[rows, order] for values in (detected.points, detected.confidence, detected.present)
    )
    people = visible.any(-1)
    if not people.any(1).all():
        raise ValueError(f"no visible keypoint in images {(~people.any(1)).nonzero().flatten().tolist()} of the batch")
    measured = measurable(target, visible)
    scored = measured.any(1)
    shares = {}
    for box, pose in (("target", target), ("predicted", points)):
        side = box_side(pose[measured], visible[measured])
        correct = pck(points[measured], target[measured], visible[measured], side, alphas)
        correct = correct * present[measured][:, None]
        means = (mean_over_people(column, measured) for column in correct.unbind(1))
        shares[box] = dict(zip(map(str, alphas), means, strict=True))
    sure = mean_over_people(confidence[people].mean(-1), people)
    return [
        {
            "pck": {
                box: {alpha: float(v[i]) if scored[i] else None for alpha, v in by_alpha.items()}
                for box, by_alpha in shares.items()
            },
            "confidence": float(sure[i]),
            "present": bool(present[i][people[i]].all()),
            "points": points[i].tolist(),
        }
        for i in range(len(keypoints))
    ]


def mean_over_people(values: Tensor, people: Tensor) -> Tensor:
    """Means over the people of each image: values (N,) of those marked in people (B, P) -> (B,)."""
    by_image = torch.zeros(people.shape, dtype=values.dtype, device=values.device)
    by_image[people] = values
    return by_image.sum(1) / people.sum(1)


def _summary(values: Tensor) -> dict[str, float]:
    sem = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sem": sem}


def summarise(records: Sequence[dict[str, Any]], alphas: Sequence[float]) -> dict[str, Any]:
    """Means over images of every condition, and the paired gain of guidance with its 95 % interval.

    Raises:
        ValueError: no image has a size to measure its PCK by.
    """
    result: dict[str, Any] = {}
    scored = [r for r in records if None not in r["guided"]["pck"]["target"].values()]
    if not scored:
        raise ValueError(f"PCK: expected a person of two visible keypoints in one image, found none in {len(records)}")
    for box, name in zip(BOXES, ("pck", "pck_predicted_box"), strict=True):
        result[name] = {}
        for alpha in map(str, alphas):
            values = {c: torch.tensor([r[c]["pck"][box][alpha] for r in scored]) for c in CONDITIONS}
            row: dict[str, Any] = {condition: _summary(values[condition]) for condition in CONDITIONS}
            if len(scored) > 1:
                row["gain"] = paired_gain(values["unguided"], values["guided"])
            row["share_of_ceiling"] = row["guided"]["mean"] / max(row["ceiling"]["mean"], 1e-9)
            result[name][alpha] = row
    result["confidence"] = {c: _summary(torch.tensor([r[c]["confidence"] for r in records])) for c in CONDITIONS}
    result["present"] = {c: sum(r[c]["present"] for r in records) / len(records) for c in CONDITIONS}
    result["images"], result["left_out"] = len(records), len(records) - len(scored)
    return result


def distances_to(renders: Tensor, sets: dict[str, Tensor], detector: KeypointDetector) -> dict[str, float] | None:
    """Kernel distance of sets of images to renders; None where there are fewer than KERNEL_IMAGES."""
    if min(len(renders), *map(len, sets.values())) < KERNEL_IMAGES:
        return None
    with torch.no_grad():
        features = {name: detector.embed(images) for name, images in {**sets, "renders": renders}.items()}
    return {name: kernel_distance(features[name], features["renders"]) for name in sets}


def headline(results: dict[str, Any]) -> float:
    """Guided PCK at the largest alpha, a mean over images."""
    return results["pck"][max(results["pck"], key=float)]["guided"]["mean"]


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    images = f"{results['images']} images"
    if results.get("left_out"):
        images += f", {results['left_out']} of them without a size for PCK"
    lines = [
        f"| {images} | unguided | guided | ceiling | gain (95 % interval) | guided / ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for alpha, row in results["pck"].items():
        cells = [f"{row[c]['mean']:.3f} ± {row[c]['sem']:.3f}" for c in CONDITIONS]
        gain = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["gain"]) if "gain" in row else "-"
        lines.append(f"| PCK@{alpha} | {' | '.join(cells)} | {gain} | {row['share_of_ceiling']:.1%} |")
    cells = [f"{results['confidence'][c]['mean']:.3f} ± {results['confidence'][c]['sem']:.3f}" for c in CONDITIONS]
    lines.append(f"| detector confidence | {' | '.join(cells)} | | |")
    if results.get("kernel_distance"):
        cells = [f"{results['kernel_distance'][c]:.4f}" for c in CONDITIONS]
        lines.append(f"| kernel distance to renders | {' | '.join(cells)} | | |")
    return "\n".join(lines) + "\n"
