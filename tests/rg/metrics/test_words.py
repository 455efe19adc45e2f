import torch

from rg.metrics.words import fidelity, said

ONE = "a person with long brown hair in a green shirt and blue trousers and a blue hat on snow at dusk"
TWO = "two people on road at day, a person in a red shirt and black trousers and a person in a white shirt"


def test_what_a_prompt_says_of_each_person():
    assert said(ONE) == {"shirt": "green", "trousers": "blue"}
    assert said(ONE, ("hat", "glasses")) == {"hat": "blue"}
    assert said(TWO) == {"shirt": "red", "trousers": "black", "second_shirt": "white"}
    assert said("grass at dusk") == {}


def test_all_that_is_named_has_to_be_right():
    right = {"shirt": "green", "trousers": "blue", "hat": "none"}
    read = [right, {**right, "trousers": "red"}, {"shirt": "green"}, right, {**right, "shirt": "red"}]
    prompts = [ONE, ONE, ONE, "a portrait on snow", "a portrait of a person in a red shirt"]
    found = fidelity(read, prompts)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.0, float("nan"), 1.0]), equal_nan=True)
