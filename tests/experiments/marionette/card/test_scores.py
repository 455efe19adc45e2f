import math

import pytest
import torch

from experiments.marionette.card.scores import both, distance_to, distances, fidelity, flips, named, psnr, share, whole

ONE = {"people": "one", "portrait": "no", "shirt": "red", "trousers": "blue", "hat": "none", "hair": "blond"}
PROMPT = "a person with long blond hair in a red shirt and blue trousers on grass at day"
BALD = "a person in a red shirt and blue trousers on grass at day"


def test_a_share_has_the_binomial_standard_error():
    assert share(3, 4) == {"share": 0.75, "sem": math.sqrt(0.75 * 0.25 / 4), "count": 4}
    assert share(0, 0) == {"share": 0.0, "sem": 0.0, "count": 0}


def test_psnr_of_a_known_error():
    originals = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    images = originals.clone()
    images[0] += 51  # a fifth of the range: 10 log10(25) dB
    images[1, :, :2] += 51  # half of the pixels
    assert psnr(images, originals) == pytest.approx((13.979 + 16.990) / 2, abs=1e-3)


def test_distance_grows_with_a_shift_and_its_error_covers_zero_without():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 8, generator=generator) for _ in range(2))
    found = distance_to({"same": a, "moved": a + 0.5}, b)
    same, moved = found["same"], found["moved"]
    assert abs(same["value"]) < 3 * same["sem"] and moved["value"] > 5 * moved["sem"] > 0


def test_distance_of_two_points_is_known_and_sure():
    # (1 * 1 + 1)^3 + (0 * 0 + 1)^3 - 2 (1 * 0 + 1)^3, whichever part is left out.
    found = distance_to({"ones": torch.ones(20, 1), "ceiling": torch.zeros(20, 1)}, torch.zeros(20, 1), parts=5)
    assert found["ceiling"] == {"value": 0.0, "sem": 0.0}
    assert found["ones"] == {"value": 7.0, "sem": 0.0, "excess": 7.0, "excess_sem": 0.0}


def test_the_excess_is_surer_than_what_it_is_taken_from():
    generator = torch.Generator().manual_seed(0)
    a, b, noise = (torch.randn(200, 8, generator=generator) for _ in range(3))
    found = distance_to({"samples": a + 0.1 * noise, "ceiling": a}, b)["samples"]
    assert found["excess_sem"] < found["sem"]


def test_standardised_distances_do_not_know_the_scale_of_the_features():
    generator = torch.Generator().manual_seed(0)
    images, renders = (torch.randn(40, 6, generator=generator) for _ in range(2))
    small, large = (distances({"s": images}, renders, lambda x, f=f: f * x + 1, 4) for f in (0.1, 10.0))
    assert small["standardised"]["s"]["value"] == pytest.approx(large["standardised"]["s"]["value"])
    assert small["raw"]["s"]["value"] != pytest.approx(large["raw"]["s"]["value"])


def test_too_few_images_for_the_parts_are_refused():
    with pytest.raises(ValueError, match="2 parts of 2 .* 7 .* 4"):
        distance_to({"few": torch.zeros(7, 2)}, torch.zeros(9, 2), parts=4)


def test_a_person_is_whole_with_enough_sure_keypoints():
    confidence = torch.zeros(3, 18)
    confidence[1, :16] = confidence[2, :15] = 0.5
    assert whole(confidence, least=0.5, keypoints=16).tolist() == [False, True, False]


def test_hair_counts_only_where_the_prompt_names_it():
    assert named(ONE, PROMPT) == set(ONE)
    assert named(ONE, BALD) == set(ONE) - {"hair"}
    two = {"hair": "black", "hair_length": "long", "second_hair": "brown", "second_hair_length": "short"}
    prompt = "two people on sand at day a person in a red shirt and a person with short brown hair in a red shirt"
    assert named(two, prompt) == {"second_hair", "second_hair_length"}


def test_fidelity_counts_what_is_named():
    wrong = {**ONE, "hair": "black", "hat": "red"}
    found = fidelity([ONE, wrong, wrong], [ONE, ONE, ONE], [PROMPT, PROMPT, BALD])["alone"]
    assert found["shirt"]["share"] == 1 and found["hat"]["share"] == pytest.approx(1 / 3)
    assert found["hair"]["share"] == 0.5 and found["hair"]["count"] == 2
    assert found["all"]["count"] == 17 and found["all"]["share"] == pytest.approx(14 / 17)
    assert found["every"]["share"] == pytest.approx(1 / 3)


def test_two_people_are_counted_apart_and_together():
    asked = {"people": "two", "shirt": "red", "second_shirt": "blue"}
    read = {**asked, "second_shirt": "red"}
    found = fidelity([read], [asked], ["two people a person in a red shirt and a person in a blue shirt"])
    assert found["alone"] == {} and found["two"]["shirt"]["share"] == 0.5 and found["two"]["shirt"]["count"] == 2


def test_both_colours_have_to_be_right():
    assert both([ONE, {**ONE, "shirt": "blue"}], [ONE, ONE])["share"] == 0.5


def test_a_flip_is_the_asked_for_change_and_nothing_else():
    after = [
        {**ONE, "shirt": "blue"},  # as asked for
        {**ONE, "shirt": "green"},  # another colour
        {**ONE, "shirt": "blue", "trousers": "red"},  # and something else
        ONE,  # nothing
    ]
    found = flips([ONE] * 4, after, [ONE] * 4, ["blue"] * 4, "shirt")
    assert found["flipped"]["share"] == 0.5 and found["others"]["share"] == 0.75 and found["both"]["share"] == 0.25
    assert found["changed"]["trousers"]["share"] == 0.25 and found["changed"]["hat"]["share"] == 0
    assert "shirt" not in found["changed"]


def test_a_wrong_image_before_is_no_flip():
    found = flips([{**ONE, "shirt": "green"}], [{**ONE, "shirt": "blue"}], [ONE], ["blue"], "shirt")
    assert found["flipped"]["share"] == 0
