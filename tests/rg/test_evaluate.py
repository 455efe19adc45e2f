"""Which held-out images are evaluated."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from rg.data.samples import Groups, Samples, to_png
from rg.evaluate import Evaluation, choose_judges, load_judges, measurable_samples


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
    kept = measurable_samples(samples)
    assert kept.index.tolist() == [0, 3] and kept.prompt == ["image 0", "image 3"]
    assert torch.equal(kept.keypoints, samples.keypoints[[0, 3]]) and len(kept.latent) == len(kept.label) == 2
    assert measurable_samples(make_samples(3, 18)).index.tolist() == [0, 1]


def test_nobody_at_all_is_an_error():
    with pytest.raises(ValueError, match="data: .*person.* 2 images"):
        measurable_samples(make_samples(0, 1))
    groups = Groups(*[torch.zeros(1)] * 5, prompt=[""], size=(8, 8))
    with pytest.raises(ValueError, match="data: .*keypoints.*groups"):
        measurable_samples(groups)


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
        ("world.judges=[hourglas]", r"world\.judges: expected some of .*'transformer'.*'hourglas'"),
        ("world.judges=[hourglass,hourglass]", r"world\.judges: .*once"),
        ("clip=nowhere", r"clip=nowhere: expected a folder"),
    ],
)
def test_bad_settings_are_said_before_any_image_is_made(evaluation, tmp_path, word, named):
    with pytest.raises((ValueError, FileNotFoundError, InstantiationException), match=named):
        evaluation(word)
    assert not (tmp_path / "data").exists()


@pytest.fixture
def judged(root):
    """The configuration of an evaluation by annotators: `judged("world.judges=[movenet]")`."""

    def make(*words: str):
        with initialize_config_dir(str(root / "conf"), version_base="1.3"):
            return compose("evaluate", ["world=sdxl", "run_dir=run", *words])

    return make


def test_who_made_the_labels_is_no_judge_but_by_order(judged):
    words = "world.judges=[openpose,movenet]"
    with pytest.raises(ValueError, match=r"found openpose, and OpenPose made them.*\[movenet,blazepose\].*allow_same"):
        choose_judges(judged(words), "OpenPose")
    assert choose_judges(judged(words, "allow_same_judge=true"), "OpenPose") == ["movenet", "openpose"]
    for labelled_by in ("ExactPose", "FileLabels", None):
        assert choose_judges(judged(), labelled_by) == ["openpose", "movenet"]


@pytest.mark.parametrize(
    ("judge", "named"),
    [
        ("openpose", r"lllyasviel/Annotators/body_pose_model\.pth: .*world\.detectors\.openpose\.annotator\.weights="),
        ("movenet", r"world\.detectors\.movenet\.annotator\.folder=data/.*movenet-multipose\.json of .*docs/data\.md"),
    ],
)
def test_a_judge_without_weights_is_said_with_file_home_and_key(judged, tmp_path, monkeypatch, judge, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InstantiationException, match=rf"{named}.*world\.judges=\[") as caught:
        load_judges(judged(f"world.judges=[{judge}]"), None)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.slow
def test_a_run_counts_what_it_left_out_and_takes_any_alphas(evaluation):
    words = ["images=2", "batch_size=1", "alphas=[0.15,0.05]", "guidance.keep_readouts=false"]
    made = evaluation(*words, "+sampling.negative_prompt=[dusk,night]")
    results = made.run()
    assert results["left_out"] == 0 and results["images"] == 2
    assert list(results["judges"]) == ["hourglass", "transformer"] and results["labeller"] is None
    for scores in results["judges"].values():
        assert set(scores["pck"]) == {"0.15", "0.05"} and "gain" in scores["oks"]
    assert set(results["agreement"]) == {"transformer"} and results["cmmd"] is None


def test_clip_s_distance_is_measured_where_a_model_is_given(evaluation, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=8)
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    results = evaluation("images=2", f"clip={tmp_path}/clip", "world.judges=[transformer]").run()
    assert set(results["cmmd"]) == {"unguided", "guided", "ceiling"} and results["kernel_distance"] is None
    assert list(results["judges"]) == ["transformer"] and not results["agreement"]
    assert results["cmmd"]["ceiling"] >= 0 and "CMMD" in (tmp_path / "run/table.md").read_text()


@pytest.mark.slow
def test_what_is_damaged_is_made_again_and_nothing_else(evaluation, tmp_path, caplog):
    words = ["images=3", "batch_size=2"]
    results, samples = evaluation(*words).run(), tmp_path / "run" / "samples"
    whole = {path.name: path.read_bytes() for path in samples.iterdir()}
    times = {path.name: path.stat().st_mtime_ns for path in samples.iterdir()}
    assert evaluation(*words).run()["judges"] == results["judges"] and not caplog.messages
    (samples / "00000-guided.png").write_bytes(whole["00000-guided.png"][:-30])
    flipped = bytearray(whole["00002-readout.png"])
    flipped[len(flipped) // 2] ^= 1
    (samples / "00002-readout.png").write_bytes(flipped)
    (samples / "00001.json").unlink()
    again = evaluation(*words).run()
    assert again["judges"] == results["judges"] and again["agreement"] == results["agreement"]
    said = [text for text in caplog.messages if "made again" in text]
    assert len(said) == 2 and "00000-guided.png" in said[0] and "00002-readout.png" in said[1]
    # Every image is as it was, bit for bit; records hold times, too.
    assert {n: d for n, d in whole.items() if n.endswith("png")} == {p.name: p.read_bytes() for p in samples.glob("*g")}
    (samples / "00001.json").write_text("{}")
    before = (samples / "00000.json").stat().st_mtime_ns
    assert evaluation(*words).run()["judges"] == results["judges"] and "00001.json: position" in caplog.text
    assert before == (samples / "00000.json").stat().st_mtime_ns != times["00000.json"]


@pytest.mark.slow
def test_two_workers_make_the_same_files_as_one(evaluation, tmp_path):
    results, files = [], []
    for words in ([], ["engine.workers=2"]):
        results.append(evaluation("images=3", "batch_size=2", *words).run())
        samples = tmp_path / "run/samples"
        files.append({path.name: path.read_bytes() for path in samples.glob("*.png")})
        records = [json.loads(path.read_text()) for path in sorted(samples.glob("*.json"))]
        files.append([{key: value for key, value in record.items() if key != "seconds"} for record in records])
        samples.rename(tmp_path / f"samples-{len(files)}")
    assert files[:2] == files[2:] and len(files[0]) == 3 * 4
    assert results[0]["judges"] == results[1]["judges"]
    assert not list((tmp_path / "run").glob("samples-*")), "an engine is no other setting"


@pytest.mark.slow
def test_samples_of_other_settings_are_set_aside_each_time(evaluation, tmp_path):
    for seed in (0, 1, 0, 1):
        made = evaluation("images=1", f"seed={seed}")
        made.record_path(0).parent.mkdir()
        made.record_path(0).write_text(str(seed))
    found = sorted(path.read_text() for path in (tmp_path / "run").glob("samples*/*.json"))
    assert found == ["0", "0", "1", "1"]
