"""Which held-out images are evaluated."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException

from rg.data.samples import Groups, Samples, to_png
from rg.evaluate import Evaluation, measurable


def make_samples(*visible: int) -> Samples:
    """Images of a person of whom as many keypoints are visible."""
    count = len(visible)
    keypoints = torch.rand(count, 2, 18, 3, generator=torch.Generator().manual_seed(0)) * 8
    keypoints[:, 1] = 0
    keypoints[:, 0, :, 2] = torch.stack([(torch.arange(18) < number).float() for number in visible])
    images = [to_png(torch.zeros(3, 8, 8, dtype=torch.uint8))] * count
    prompts = [f"image {number}" for number in range(count)]
    return Samples(torch.arange(count), images, images, keypoints, torch.zeros(count, 8, 2, 2).half(), prompts, (8, 8))


def test_images_without_a_person_to_measure_are_left_out():
    samples = make_samples(18, 0, 1, 2)
    kept = measurable(samples)
    assert kept.index.tolist() == [0, 3] and kept.prompt == ["image 0", "image 3"]
    assert torch.equal(kept.keypoints, samples.keypoints[[0, 3]]) and len(kept.latent) == len(kept.label) == 2
    assert measurable(make_samples(3, 18)).index.tolist() == [0, 1]


def test_nobody_at_all_is_an_error():
    with pytest.raises(ValueError, match="data: .*person.* 2 images"):
        measurable(make_samples(0, 1))
    groups = Groups(*[torch.zeros(1)] * 5, prompt=[""], size=(8, 8))
    with pytest.raises(ValueError, match="data: .*keypoints.*groups"):
        measurable(groups)


@pytest.fixture
def evaluation(root, tmp_path):
    """An evaluation of two rendered poses: `evaluation("images=2")`."""

    def make(*words: str) -> Evaluation:
        words = [f"run_dir={tmp_path}", f"data.builder.root={tmp_path}/data", "sampling.num_inference_steps=1", *words]
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            return Evaluation(compose("evaluate", words), tmp_path / "run")

    return make


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("guidance.stop=2", "stop.* 2"),
        ("+sampling.height=96", r"height.*\(64, 64\).*\(96, 64\)"),
        ("alphas=[0.1,1.5]", r"alphas: .*1\.5"),
    ],
)
def test_bad_settings_are_said_before_any_image_is_made(evaluation, tmp_path, word, named):
    with pytest.raises((ValueError, InstantiationException), match=named):
        evaluation(word)
    assert not (tmp_path / "data").exists()


def test_a_run_counts_what_it_left_out_and_takes_any_alphas(evaluation):
    words = ["images=2", "batch_size=1", "alphas=[0.15,0.05]", "guidance.keep_readouts=false"]
    made = evaluation(*words, "+sampling.negative_prompt=[dusk,night]")
    results = made.run()
    assert results["left_out"] == 0 and set(results["pck"]) == {"0.15", "0.05"} and results["images"] == 2
