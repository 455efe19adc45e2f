import json
from pathlib import Path

import pytest
import torch

from rg.detectors.detection import Detection
from rg.detectors.keypoints import KeypointDetector
from rg.io.records import validate
from rg.report import (
    KERNEL_IMAGES,
    ImageRecord,
    Results,
    agreements,
    distances_to,
    headline,
    read_record,
    score_images,
    share_of_words,
    summarise,
    table,
)

CONDITIONS = ("unguided", "guided", "ceiling")


def square_pose(side: float, hidden: tuple[int, ...] = ()) -> torch.Tensor:
    """Keypoints on the corners of a square of `side` pixels: (1, 1, 18, 3)."""
    corners = torch.tensor([[10.0, 10.0], [10.0 + side, 10.0], [10.0, 10.0 + side], [10.0 + side, 10.0 + side]])
    pose = torch.cat([corners.repeat(5, 1)[:18], torch.ones(18, 1)], -1)
    pose[list(hidden), 2] = 0
    return pose[None, None]


def detection(points: torch.Tensor, present: bool = True) -> Detection:
    shape = points.shape[:2]
    return Detection(points, torch.full(points.shape[:3], 0.5), torch.full(shape, 0.5), torch.full(shape, present))


def record(shares: dict[str, float], confidence: float = 0.5, present: bool = True) -> dict:
    """Of one image by one judge, all whose scores are the share."""
    return {
        condition: {
            "pck": {box: {"0.1": share} for box in ("target", "predicted")},
            "oks": share,
            "confidence": confidence,
            "present": present,
        }
        for condition, share in shares.items()
    }


def of_one(*records: dict) -> list[dict]:
    """Records of an evaluation with one judge."""
    return [{"judges": {"one": scores}, "agreement": {}} for scores in records]


def test_a_keypoint_counts_within_alpha_of_the_targets_box():
    pose = square_pose(20.0)
    # 9 of 18 keypoints are off by 3 px: outside of 0.1 * 20 = 2 px, inside of 0.2 * 20 = 4 px.
    points = pose[..., :2].clone()
    points[..., :9, 0] += 3
    (score,) = score_images(detection(points), pose, (0.1, 0.2))
    assert score["pck"]["target"] == {"0.1": pytest.approx(0.5), "0.2": pytest.approx(1.0)}


def test_hidden_keypoints_do_not_count_and_the_box_of_the_prediction_is_its_own():
    pose = square_pose(20.0, hidden=tuple(range(9)))
    points = pose[..., :2].clone()
    points[..., :9, :] += 100
    points[..., 9:, :] = (points[..., 9:, :] - 10) * 3 + 10  # three times as large: only corner (10, 10) is right
    (score,) = score_images(detection(points), pose, (0.05,))
    right = float((pose[0, 0, 9:, :2] == 10).all(-1).float().mean())
    assert score["pck"]["target"]["0.05"] == pytest.approx(right)
    (wide,) = score_images(detection(points), pose, (0.7,))
    assert wide["pck"]["predicted"]["0.7"] > wide["pck"]["target"]["0.7"], "0.7 * 60 px reaches further than 0.7 * 20"


def test_an_undetected_person_is_wrong_everywhere():
    pose = square_pose(20.0)
    (score,) = score_images(detection(pose[..., :2], present=False), pose, (0.1,))
    assert score["pck"]["target"]["0.1"] == 0 and not score["present"]


def test_people_are_matched_and_averaged():
    pose = torch.cat([square_pose(20.0), square_pose(20.0) + torch.tensor([30.0, 0, 0])], 1)
    points = pose[:, [1, 0], :, :2].clone()  # found in the other order
    points[:, 0, :9, 0] += 3
    (score,) = score_images(detection(points), pose, (0.1,))
    assert score["pck"]["target"]["0.1"] == pytest.approx(0.75) and score["present"]
    assert score["points"] == points[0, [1, 0]].tolist()
    # A person who is not asked for does not count, found or not.
    alone = pose * torch.tensor([1.0, 0])[:, None, None]
    found = detection(points)._replace(present=torch.tensor([[False, True]]))
    (score,) = score_images(found, alone, (0.1,))
    assert score["pck"]["target"]["0.1"] == 1 and score["present"]
    (score,) = score_images(found, pose, (0.1,))
    assert score["pck"]["target"]["0.1"] == 0.5 and not score["present"]
    with pytest.raises(ValueError, match=r"images \[0\]"):
        score_images(found, torch.zeros_like(pose), (0.1,))


def test_summary_is_paired():
    records = [
        record({"unguided": 0.1, "guided": 0.5, "ceiling": 0.8}),
        record({"unguided": 0.5, "guided": 0.9, "ceiling": 1.0}),
    ]
    scores = summarise(of_one(*records), (0.1,), ["one"])["judges"]["one"]
    assert scores["oks"] == scores["pck"]["0.1"] == scores["pck_predicted_box"]["0.1"]
    row = scores["pck"]["0.1"]
    assert row["guided"]["mean"] == pytest.approx(0.7)
    assert row["guided"]["sem"] == pytest.approx(0.2)
    # Every image gains exactly 0.4, however much the images differ: the interval has no width.
    assert row["gain"] == {key: pytest.approx(0.4, abs=1e-6) for key in ("mean", "low", "high")}
    assert row["share_of_ceiling"] == pytest.approx(0.7 / 0.9)


@pytest.mark.parametrize(("alphas", "expected"), [(["0.05"], 0.05), (["0.05", "0.1"], 0.1), (["0.2", "0.1"], 0.2)])
def test_the_headline_is_at_the_largest_alpha(alphas: list[str], expected: float):
    scores = {"pck": {alpha: {"guided": {"mean": float(alpha)}} for alpha in alphas}}
    other = {"pck": {alpha: {"guided": {"mean": 0.9}} for alpha in alphas}}
    assert headline({"judges": {"one": scores, "another": other}}) == expected


def test_images_scored_together_have_the_scores_of_each():
    poses = torch.cat([square_pose(20.0), square_pose(10.0, hidden=(3,)), square_pose(15.0)])
    points = poses[..., :2] + torch.arange(18.0)[:, None] / 6
    together = score_images(detection(points), poses, (0.1, 0.2))
    alone = [score_images(detection(points[i : i + 1]), poses[i : i + 1], (0.1, 0.2))[0] for i in range(3)]
    assert together == alone and 0 < together[0]["pck"]["target"]["0.1"] < together[0]["pck"]["target"]["0.2"]


def test_one_image_has_no_interval_and_a_table():
    results = summarise(of_one(record({"unguided": 0.1, "guided": 0.5, "ceiling": 0.8})), (0.1,), ["one"])
    assert "gain" not in results["judges"]["one"]["pck"]["0.1"] and not results["agreement"]
    assert "| PCK@0.1 | one | 0.100 ± 0.000 | 0.500 ± 0.000 | 0.800 ± 0.000 | - | 62.5% |" in table(results)


def test_a_person_of_one_visible_keypoint_is_left_out_and_counted():
    whole, one = square_pose(20.0), square_pose(20.0, hidden=tuple(range(1, 18)))
    points = whole[..., :2].clone()
    points[..., :9, 0] += 3
    both = torch.cat([whole, one + torch.tensor([30.0, 0, 0])], 1)
    (alone,) = score_images(detection(points), whole, (0.1,))
    (beside,) = score_images(detection(torch.cat([points, both[:, 1:, :, :2] + 9], 1)), both, (0.1,))
    assert beside["pck"] == alone["pck"]
    (nothing,) = score_images(detection(points), one, (0.1,))
    assert nothing["pck"] == {"target": {"0.1": None}, "predicted": {"0.1": None}} and nothing["present"]
    assert nothing["oks"] is None and beside["oks"] == alone["oks"]
    records = of_one(*[dict.fromkeys(CONDITIONS, scores) for scores in (alone, nothing)])
    results, expected = summarise(records, (0.1,), ["one"]), summarise(records[:1], (0.1,), ["one"])
    for name in ("pck", "pck_predicted_box", "oks"):
        assert results["judges"]["one"][name] == expected["judges"]["one"][name]
    assert (results["images"], results["left_out"]) == (2, 1)
    assert "| 2 images, 1 of them without a size for PCK |" in table(results)
    assert "| 1 images |" in table(expected) and expected["left_out"] == 0
    with pytest.raises(ValueError, match=r"PCK: .*two visible keypoints.* none in 1"):
        summarise(records[1:], (0.1,), ["one"])


def stored_record(judges: int = 2) -> dict:
    """What an evaluation stores of position 3, by judges a and b, or by a alone."""
    pose = square_pose(20.0)
    found = detection(pose[..., :2])
    scores = dict.fromkeys(CONDITIONS, score_images(found, pose, (0.1,))[0])
    same = dict.fromkeys(CONDITIONS, agreements(found, found, pose, (0.1,))[0])
    stored = {"position": 3, "prompt": "", "seconds": {"guided": 0.5, "unguided": 1}}
    return stored | {
        "judges": dict.fromkeys("ab"[:judges], scores),
        "agreement": dict.fromkeys("b"[: judges - 1], same),
    }


def test_stored_scores_are_read_as_they_were_written():
    stored = stored_record()
    assert validate(ImageRecord, stored, "00003.json").model_dump() == stored
    scores = stored["judges"]["a"]["guided"]
    for change, words in (
        ({"points": [[[0, 1]] * 17]}, r"points\.0: .*18"),
        ({"confidence": 2}, r"confidence: .*1, found 2"),
        ({"oks": -1}, r"oks: .*0, found -1"),
    ):
        judges = stored["judges"] | {"b": stored["judges"]["b"] | {"guided": scores | change}}
        with pytest.raises(ValueError, match=rf"^00003\.json: judges\.b\.guided\.{words}"):
            validate(ImageRecord, stored | {"judges": judges}, "00003.json")
    for change, words in (
        ({"judges": {"a": {}}}, r"judges\.a\.unguided: .*none"),
        ({"judges": {}}, r"judges: .*1.*found {}"),
        ({"position": "3"}, "position: .*integer, found '3'"),
    ):
        with pytest.raises(ValueError, match=rf"^00003\.json: {words}"):
            validate(ImageRecord, stored | change, "00003.json")


def test_a_record_of_another_evaluation_is_refused(tmp_path: Path):
    path = tmp_path / "00003.json"
    path.write_text(json.dumps(stored_record()))
    assert read_record(path, 3, (0.1,), ["a", "b"]) == stored_record()
    for arguments, words in (
        ((2, (0.1,), ["a", "b"]), r"\(2, .*\(3, "),
        ((3, (0.2,), ["a", "b"]), r"tolerances \['0.2'\], found \['0.1'\]"),
        ((3, (0.1,), ["a"]), r"judges .*'a'.*'b'"),
        ((3, (0.1,), ["b", "a"]), r"agreement: .*\['a'\], found \['b'\]"),
    ):
        with pytest.raises(ValueError, match=rf"^{path}: .*{words}"):
            read_record(path, *arguments)


def test_results_are_read_again():
    results = summarise(of_one(record({"unguided": 0.1, "guided": 0.5, "ceiling": 0.8})), (0.1,), ["one"])
    read = validate(Results, results, "results.json").model_dump()
    assert headline(read) == headline(results) == 0.5 and read["images"] == 1
    scores = results["judges"]["one"]
    partial = {"judges": {"one": scores | {"pck": {"0.1": {"unguided": {"mean": 0}, "guided": {"mean": 0}}}}}}
    with pytest.raises(ValueError, match=r"judges\.one\.pck\.0\.1\.ceiling: expected this key, found none"):
        validate(Results, results | partial, "results.json")
    with pytest.raises(ValueError, match="results.json: judges: .*1.*found {}"):
        validate(Results, results | {"judges": {}}, "results.json")


def test_a_keypoint_that_is_not_seen_is_wrong_and_outside_the_box():
    pose = square_pose(20.0)
    found = detection(pose[..., :2].clone())
    found.points[..., 0, :] = 5000  # where it would be does not count
    found.confidence[..., 0] = 0
    (score,) = score_images(found, pose, (0.1,))
    share = pytest.approx(17 / 18)
    assert score["pck"] == {"target": {"0.1": share}, "predicted": {"0.1": share}}
    assert score["oks"] == pytest.approx(16 / 17)  # the neck does not count
    found.confidence[:] = 0
    (score,) = score_images(found, pose, (0.1,))
    assert score["pck"]["target"]["0.1"] == score["pck"]["predicted"]["0.1"] == score["oks"] == 0


def test_agreement_of_two_judges():
    pose = square_pose(20.0, hidden=(17,))
    one, other = (pose[..., :2].clone() for _ in range(2))
    one[..., :4, 0] += 30
    other[..., 2:8, 1] -= 30
    other[..., 17, :] += 99  # hidden: does not count
    (found,) = agreements(detection(one), detection(other), pose, (0.1, 0.5))
    # Wrong by the first 0..3, by the second 2..7: of 17, 2 and 3 are wrong by both, six by one alone.
    assert found["same"] == {"0.1": pytest.approx(11 / 17), "0.5": pytest.approx(11 / 17)}
    assert found["distance"] == pytest.approx((6 * 30 + 2 * 30 * 2**0.5) / 17, rel=1e-5)
    # Whom the second judge does not find at all is wrong by it, and far from nothing.
    (found,) = agreements(detection(one), detection(one, present=False), pose, (0.1,))
    assert found == {"same": {"0.1": pytest.approx(4 / 17)}, "distance": None}
    (found,) = agreements(detection(one), detection(one), square_pose(20.0, hidden=tuple(range(1, 18))), (0.1,))
    assert found["same"] == {"0.1": None}


def test_every_judge_has_its_rows_in_the_table():
    first, second = (record({"unguided": 0.1, "guided": g, "ceiling": 0.8}) for g in (0.5, 0.25))
    same = {
        c: {"same": {"0.1": 0.75}, "distance": distance} for c, distance in zip(CONDITIONS, (1.5, 2, None), strict=True)
    }
    records = [{"judges": {"one": first, "other": second}, "agreement": {"other": same}}] * 2
    results = summarise(records, (0.1,), ["one", "other"])
    assert results["agreement"]["other"]["guided"] == {"same": {"0.1": 0.75}, "distance": 2}
    lines = table(results | {"labeller": "other", "cmmd": dict.fromkeys(CONDITIONS, 0.5)}).splitlines()
    assert (
        "| PCK@0.1 | one | 0.100 ± 0.000 | 0.500 ± 0.000 | 0.800 ± 0.000 | +0.400 (+0.400 to +0.400) | 62.5% |" in lines
    )
    assert (
        "| OKS | other | 0.100 ± 0.000 | 0.250 ± 0.000 | 0.800 ± 0.000 | +0.150 (+0.150 to +0.150) | 31.2% |" in lines
    )
    assert "| same verdict at 0.1 | one, other | 75.0% | 75.0% | 75.0% | | |" in lines
    assert "| pixels apart | one, other | 1.50 | 2.00 | - | | |" in lines
    assert "| CMMD to the data's images |  | 0.5000 | 0.5000 | 0.5000 | | |" in lines
    assert lines[-1].startswith("other made the head's training labels")
    assert {line.count("|") for line in lines if line.startswith("|")} == {8}


def test_kernel_distance_needs_many_images_and_tells_renders_from_noise(root: Path):
    detector = KeypointDetector.from_pretrained(root / "rg/models/detector")
    torch.manual_seed(0)
    flat = torch.rand(KERNEL_IMAGES, 3, 1, 1).expand(-1, -1, 64, 64) * 2 - 1
    noise = torch.randn(KERNEL_IMAGES, 3, 64, 64).clamp(-1, 1)
    assert distances_to(flat, {"same": flat[: KERNEL_IMAGES - 1]}, detector.embed) is None
    found = distances_to(flat[:KERNEL_IMAGES], {"same": flat, "noise": noise}, detector.embed)
    assert found["noise"] > 10 * abs(found["same"])


def test_the_share_of_words_is_paired_over_images_whose_prompt_names_some():
    nan = float("nan")
    right = {"unguided": torch.tensor([1.0, 1.0, 1.0, nan]), "guided": torch.tensor([1.0, 0.0, 0.0, nan])}
    words = share_of_words(right)
    assert words["unguided"]["mean"] == 1 and words["guided"]["mean"] == pytest.approx(1 / 3)
    assert words["gain"]["mean"] == pytest.approx(-2 / 3)
    assert share_of_words({"unguided": torch.tensor([nan]), "guided": torch.tensor([nan])}) is None
    results = summarise(of_one(record({"unguided": 0.0, "guided": 0.5, "ceiling": 1.0})), ["0.1"], ["one"])
    shown = table({**results, "words": words})
    assert "| shirt and trousers as asked for |  | 1.000 ± 0.000 | 0.333 ± 0.333 |  | -0.667 (" in shown
    assert "shirt" not in table({**results, "words": None})
