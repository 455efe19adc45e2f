"""Scores of sampled images against the poses they were asked for, by every judge, and how they are shown."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rg.detectors.detection import Detection
from rg.io.files import read_json
from rg.io.keypoints import Number
from rg.io.records import Record, validate
from rg.metrics.keypoints import box_side, box_sides, is_correct, match_people, measurable, oks, pck
from rg.metrics.statistics import cmmd, kernel_distance, paired_gain

CONDITIONS = ("unguided", "guided", "ceiling")
BOXES = ("target", "predicted")
# Below this number the kernel distance says nothing.
KERNEL_IMAGES = 256

Share = Annotated[float, Field(ge=0, le=1)]
Point = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Scores(Record):
    """What `score_images` says of one image."""

    pck: Annotated[dict[Literal["target", "predicted"], dict[str, Share | None]], Field(min_length=2)]
    oks: Share | None
    confidence: Share
    present: bool
    points: list[Annotated[list[Point], Field(min_length=18, max_length=18)]]


class JudgeRecord(Record):
    """What one judge says of one position's images."""

    unguided: Scores
    guided: Scores
    ceiling: Scores


class Agreement(Record):
    """What `agreements` says of one image."""

    same: dict[str, Share | None]
    distance: Annotated[float, Field(ge=0)] | None


class AgreementRecord(Record):
    """How far the first judge and another one agree on one position's images."""

    unguided: Agreement
    guided: Agreement
    ceiling: Agreement


class ImageRecord(Record):
    """What an evaluation stores of one position: its images' scores by every judge."""

    position: Annotated[int, Field(ge=0)]
    prompt: str
    seconds: Annotated[dict[Literal["unguided", "guided"], Annotated[float, Field(ge=0)]], Field(min_length=2)]
    judges: Annotated[dict[str, JudgeRecord], Field(min_length=1)]
    agreement: dict[str, AgreementRecord]


def read_record(path: Path, position: int, alphas: Sequence[float], judges: Sequence[str]) -> dict[str, Any]:
    """Reads what an evaluation stored of one position, see ImageRecord.

    Raises:
        ValueError: the file is damaged, or of another position, other judges or other tolerances.
    """
    record = validate(ImageRecord, read_json(path), str(path)).model_dump()
    if (found := (record["position"], {*record["judges"]})) != (expected := (position, {*judges})):
        raise ValueError(f"{path}: expected position and judges {expected}, found {found}")
    if (others := {*record["agreement"]}) != {*judges[1:]}:
        raise ValueError(f"{path}: agreement: expected the judges {sorted(judges[1:])}, found {sorted(others)}")
    scores = [record["judges"][judge][condition] for judge in judges for condition in CONDITIONS]
    shares = [values for one in scores for values in one["pck"].values()]
    shares += [
        by_condition[condition]["same"] for by_condition in record["agreement"].values() for condition in CONDITIONS
    ]
    for values in shares:
        if {*values} != {*map(str, alphas)}:
            raise ValueError(f"{path}: expected the tolerances {sorted(map(str, alphas))}, found {sorted(values)}")
    return record


class Mean(Record):
    """A mean over images; what stands beside it is not read again."""

    mean: Share


class Means(Record):
    """Means under every condition."""

    unguided: Mean
    guided: Mean
    ceiling: Mean


class JudgeResults(Record):
    """PCK by alpha and confidence, as one judge finds them."""

    pck: Annotated[dict[str, Means], Field(min_length=1)]
    confidence: Means


class Results(Record):
    """What of results.json is read again: the judges' scores, the headline's first, and the number of images."""

    judges: Annotated[dict[str, JudgeResults], Field(min_length=1)]
    images: Annotated[int, Field(ge=1)]


class Matched(NamedTuple):
    """A judge's poses, (B, P, ...) in the order of the people asked for; `found` is which keypoints count as found."""

    points: Tensor
    confidence: Tensor
    present: Tensor
    found: Tensor


def match(detected: Detection, keypoints: Tensor) -> Matched:
    """Gives each of the people (B, P, 18, 3) asked for one of the detected, by smallest distance.

    Raises:
        ValueError: an image whose people have no visible keypoint.
    """
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    people = visible.flatten(1).any(1)
    if not people.all():
        raise ValueError(f"no visible keypoint in images {(~people).nonzero().flatten().tolist()} of the batch")
    order = match_people(detected.points, target, visible, detected.present)
    rows = torch.arange(len(order), device=order.device)[:, None]
    points, confidence, present = (
        values[rows, order] for values in (detected.points, detected.confidence, detected.present)
    )
    return Matched(points, confidence, present, (confidence > 0) & present[..., None])


def score_images(detected: Detection, keypoints: Tensor, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """Scores of each image, means over its people, as in Scores.

    Predictions are matched with the people asked for by smallest distance; "points" are in the latter's order, and
    "present" is whether all of them were found. A keypoint of confidence 0 is not found, and wrong. People without two
    visible keypoints in different places have no size to measure by and are left out of "pck" and "oks", which are None
    where an image has no others.

    Args:
        detected: a judge's poses of B images, P people each.
        keypoints: (B, P, 18, 3) of (x, y, visible), the poses asked for; a person without a visible keypoint does not
            count, and each image has one who does.

    Raises:
        ValueError: an image whose people have no visible keypoint.
    """
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    points, confidence, present, found = match(detected, keypoints)
    people, measured = visible.any(-1), measurable(target, visible)
    aim, seen, counted = target[measured], visible[measured], found[measured]
    # Far from everywhere: within no tolerance, and no similarity.
    placed = torch.where(counted[..., None], points[measured], torch.inf)
    shares = {}
    for box, pose, shown in (("target", aim, seen), ("predicted", points[measured], seen & counted)):
        columns = pck(placed, aim, seen, box_side(pose, shown), alphas).unbind(1)
        shares[box] = dict(zip(map(str, alphas), (by_image(column, measured) for column in columns), strict=True))
    area = box_sides(aim, seen).clamp_min(1).prod(-1)  # a pose on one line has no area, but a size
    similar = by_image(oks(placed, aim, seen, area), measured)
    sure = by_image(confidence[people].mean(-1), people)
    return [
        {
            "pck": {
                box: {alpha: number(values[i]) for alpha, values in by_alpha.items()}
                for box, by_alpha in shares.items()
            },
            "oks": number(similar[i]),
            "confidence": float(sure[i]),
            "present": bool(present[i][people[i]].all()),
            "points": points[i].tolist(),
        }
        for i in range(len(keypoints))
    ]


def agreements(one: Detection, other: Detection, keypoints: Tensor, alphas: Sequence[float]) -> list[dict[str, Any]]:
    """How far two judges agree on each image, means over its people, as in Agreement.

    "same" is the share of visible keypoints that both call right or both call wrong, by the target's box; "distance" in
    pixels is the mean between their points of those that both found, None where there is none.

    Args:
        one, other: their poses of B images, P people each.
        keypoints, alphas: see `score_images`.
    """
    target, visible = keypoints[..., :2], keypoints[..., 2] > 0
    measured = measurable(target, visible)
    aim, seen = target[measured], visible[measured]
    matched = [match(detected, keypoints) for detected in (one, other)]
    size = box_side(aim, seen)
    right = [is_correct(m.points[measured], aim, size, alphas) & m.found[measured][..., None] for m in matched]
    same = ((right[0] == right[1]) & seen[..., None]).sum(1) / seen.sum(1)[:, None]
    shares = [by_image(column, measured) for column in same.unbind(1)]
    both = visible & matched[0].found & matched[1].found & measured[..., None]
    apart = torch.where(both, (matched[0].points - matched[1].points).norm(dim=-1), 0.0).flatten(1).sum(1)
    distance = apart / both.flatten(1).sum(1)  # nan where there is none
    return [
        {
            "same": {str(alpha): number(values[i]) for alpha, values in zip(alphas, shares, strict=True)},
            "distance": number(distance[i]),
        }
        for i in range(len(keypoints))
    ]


def number(value: Tensor) -> float | None:
    """A number, None for nan."""
    return None if value.isnan() else float(value)


def by_image(values: Tensor, people: Tensor) -> Tensor:
    """Means over the people of each image: values (N,) of those marked in people (B, P) -> (B,), nan for none."""
    spread = torch.zeros(people.shape, dtype=values.dtype, device=values.device)
    spread[people] = values
    return spread.sum(1) / people.sum(1)


def _summary(values: Tensor) -> dict[str, float]:
    sem = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sem": sem}


def _compared(records: Sequence[dict[str, Any]], score: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """Means over images of a score under every condition, and the paired gain of guidance with its 95 % interval."""
    values = {c: torch.tensor([score(record[c]) for record in records]) for c in CONDITIONS}
    row: dict[str, Any] = {condition: _summary(values[condition]) for condition in CONDITIONS}
    if len(records) > 1:
        row["gain"] = paired_gain(values["unguided"], values["guided"])
    row["share_of_ceiling"] = row["guided"]["mean"] / max(row["ceiling"]["mean"], 1e-9)
    return row


def _judged(records: Sequence[dict[str, Any]], alphas: Sequence[float]) -> dict[str, Any]:
    """One judge's scores of the images, by condition, summed up."""
    scored = [record for record in records if record["guided"]["oks"] is not None]
    result: dict[str, Any] = {}
    for box, name in zip(BOXES, ("pck", "pck_predicted_box"), strict=True):
        result[name] = {a: _compared(scored, lambda s, b=box, a=a: s["pck"][b][a]) for a in map(str, alphas)}
    result["oks"] = _compared(scored, lambda scores: scores["oks"])
    result["confidence"] = {c: _summary(torch.tensor([r[c]["confidence"] for r in records])) for c in CONDITIONS}
    result["present"] = {c: sum(r[c]["present"] for r in records) / len(records) for c in CONDITIONS}
    return result


def _agreed(records: Sequence[dict[str, Any]], alphas: Sequence[float]) -> dict[str, Any]:
    """Mean agreement of two judges under every condition; the distance is None where they never found the same."""
    result = {}
    for condition in CONDITIONS:
        found = [record[condition] for record in records if None not in record[condition]["same"].values()]
        same = {alpha: sum(one["same"][alpha] for one in found) / len(found) for alpha in map(str, alphas)}
        distances = [one["distance"] for one in found if one["distance"] is not None]
        result[condition] = {"same": same, "distance": sum(distances) / len(distances) if distances else None}
    return result


def summarise(records: Sequence[dict[str, Any]], alphas: Sequence[float], judges: Sequence[str]) -> dict[str, Any]:
    """Every judge's means over images, the paired gain of guidance, and how far the judges agree with the first.

    Args:
        records: as in ImageRecord.
        alphas: tolerances.
        judges: names, the one whose scores are the headline first.

    Raises:
        ValueError: no image has a size to measure its PCK by.
    """
    scored = [record for record in records if record["judges"][judges[0]]["guided"]["oks"] is not None]
    if not scored:
        raise ValueError(f"PCK: expected a person of two visible keypoints in one image, found none in {len(records)}")
    return {
        "judges": {judge: _judged([record["judges"][judge] for record in records], alphas) for judge in judges},
        "agreement": {j: _agreed([record["agreement"][j] for record in records], alphas) for j in judges[1:]},
        "images": len(records),
        "left_out": len(records) - len(scored),
    }


def distances_to(
    renders: Tensor, sets: dict[str, Tensor], embed: Callable[[Tensor], Tensor], *, clip: bool = False
) -> dict[str, float] | None:
    """Distances of sets of images to renders: kernel distances, or with CLIP's features CMMDs.

    None where there are fewer than KERNEL_IMAGES, or for a CMMD fewer than two.
    """
    if min(len(renders), *map(len, sets.values())) < (2 if clip else KERNEL_IMAGES):
        return None
    with torch.no_grad():
        features = {name: embed(images) for name, images in {**sets, "renders": renders}.items()}
    return {name: (cmmd if clip else kernel_distance)(features[name], features["renders"]) for name in sets}


def share_of_words(right: dict[str, Tensor]) -> dict[str, dict[str, float]] | None:
    """{condition: {"mean", "sem"}} and the paired "gain" of what `fidelity` says of unguided and guided images; None
    where no prompt names anything."""
    named = ~right["unguided"].isnan()
    if not named.any():
        return None
    result = {condition: _summary(values[named]) for condition, values in right.items()}
    if named.sum() > 1:
        result["gain"] = paired_gain(right["unguided"][named], right["guided"][named])
    return result


def headline(results: dict[str, Any]) -> float:
    """The first judge's guided PCK at the largest alpha, a mean over images."""
    shares = next(iter(results["judges"].values()))["pck"]
    return shares[max(shares, key=float)]["guided"]["mean"]


def objectives(results: dict[str, Any], names: Sequence[str]) -> float | tuple[float, ...]:
    """What a search is to raise: "pck", the headline, and "words", the share of guided images as their prompts ask for.

    Where no prompt asks for anything that is read, all of them are.
    """
    words = results["words"]
    known = {"pck": headline(results), "words": 1.0 if words is None else words["guided"]["mean"]}
    values = [known[name] for name in names]
    return values[0] if len(values) == 1 else tuple(values)


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, a row for each score and judge."""
    images = f"{results['images']} images"
    if results.get("left_out"):
        images += f", {results['left_out']} of them without a size for PCK"
    lines = [
        f"| {images} | judge | unguided | guided | ceiling | gain (95 % interval) | guided / ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    judges = results["judges"]
    first = next(iter(judges))
    for alpha in judges[first]["pck"]:
        lines += [_row(f"PCK@{alpha}", judge, scores["pck"][alpha]) for judge, scores in judges.items()]
    lines += [_row("OKS", judge, scores["oks"]) for judge, scores in judges.items()]
    lines += [_row("confidence", judge, scores["confidence"]) for judge, scores in judges.items()]
    for other, found in results["agreement"].items():
        pair, alphas = f"{first}, {other}", found["guided"]["same"]
        for alpha in alphas:
            lines.append(
                _plain(f"same verdict at {alpha}", pair, [f"{found[c]['same'][alpha]:.1%}" for c in CONDITIONS])
            )
        apart = [found[c]["distance"] for c in CONDITIONS]
        lines.append(_plain("pixels apart", pair, ["-" if far is None else f"{far:.2f}" for far in apart]))
    if words := results.get("words"):
        lines.append(_row("shirt and trousers as asked for", "", words))
    for name, title in (("kernel_distance", "kernel distance to renders"), ("cmmd", "CMMD to the data's images")):
        if results.get(name):
            lines.append(_plain(title, "", [f"{results[name][c]:.4f}" for c in CONDITIONS]))
    if results.get("labeller"):
        lines += [
            "",
            f"{results['labeller']} made the head's training labels: it is no independent judge.",
        ]
    return "\n".join(lines) + "\n"


def _row(title: str, judge: str, row: Mapping[str, Any]) -> str:
    cells = [f"{row[c]['mean']:.3f} ± {row[c]['sem']:.3f}" if c in row else "" for c in CONDITIONS]
    if not {"share_of_ceiling", "gain"} & {*row}:
        return _plain(title, judge, cells)
    gain = "{mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**row["gain"]) if "gain" in row else "-"
    share = f"{row['share_of_ceiling']:.1%}" if "share_of_ceiling" in row else ""
    return f"| {title} | {judge} | {' | '.join(cells)} | {gain} | {share} |"


def _plain(title: str, judge: str, cells: Sequence[str]) -> str:
    return f"| {title} | {judge} | {' | '.join(cells)} | | |"
