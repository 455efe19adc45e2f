import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from omegaconf import OmegaConf
from PIL import Image

from rg.backbone.diffusion import DiffusionBackbone
from rg.generation import SCHEDULERS, check_sampling, generate, generate_in_batches, image_seeds, set_scheduler, watched
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget
from rg.io.images import load_control, save_image
from rg.points import rescale

PROMPTS = ["a person in a red shirt", "two people at dusk", "grass"]
KEYPOINTS = torch.stack([torch.arange(18.0) * 2, 40 - torch.arange(18.0), torch.arange(18) % 2], -1)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler])
def test_an_image_depends_on_its_prompt_and_seed_alone(tiny_pipeline, scheduler):
    pipe = tiny_pipeline(scheduler=scheduler)
    arguments = {"num_inference_steps": 3, "guidance_scale": 2.0}
    together = generate(pipe, PROMPTS, seeds=[5, 6, 7], **arguments)
    assert together.shape == (3, 3, 32, 32) and together.min() >= -1 and together.max() <= 1
    for i in (2, 0, 1):
        alone = generate(pipe, PROMPTS[i : i + 1], seeds=[5 + i], **arguments)
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    other = generate(pipe, PROMPTS[:1], seeds=[8], **arguments)
    assert (other[0] - together[0]).abs().max() > 1e-2


def test_guidance_is_attached_for_the_call_alone(tiny_pipeline, tiny_head, poses):
    pipe = tiny_pipeline()
    term = GuidanceTerm(tiny_head(pipe.unet), FixedTarget(poses(3)))
    guidance = ReadoutGuidance([term], normalize="rms", readout_scale=3.0)
    arguments = {"seeds": [0, 1, 2], "num_inference_steps": 3}
    plain = generate(pipe, PROMPTS, **arguments)
    guided = generate(pipe, PROMPTS, guidance=guidance, **arguments)
    assert ((guided - plain).flatten(1).abs().amax(1) > 1e-3).all()
    assert torch.equal(generate(pipe, PROMPTS, **arguments), plain)


@pytest.mark.parametrize("branch", ["uncond", "both"])
@pytest.mark.parametrize("size", [1, 2])
def test_images_and_trace_do_not_depend_on_the_batch(tiny_pipeline, tiny_head, poses, branch, size):
    pipe, people, sizes = tiny_pipeline(), poses(3), []
    head = tiny_head(pipe.unet)
    pipe.unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))

    def guide(part):
        terms = [GuidanceTerm(head, FixedTarget(people[part]))]
        return ReadoutGuidance(terms, normalize="rms", branch=branch, keep_readouts=True)

    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = {"seeds": [0, 1, 2], "num_inference_steps": 2, "guidance_scale": 2.0, "latents": noise}
    arguments |= {"negative_prompt": ["", "dusk", "grass"], "guide": guide}
    whole, trace = generate_in_batches(pipe, PROMPTS, batch_size=16, **arguments)
    assert torch.equal(whole, generate(pipe, PROMPTS, guidance=guide(slice(0, 3)), **without_guide(arguments)))
    sizes.clear()
    images, joined = generate_in_batches(pipe, PROMPTS, batch_size=size, **arguments)
    assert max(sizes) == 2 * size
    torch.testing.assert_close(images, whole, rtol=0, atol=1e-4)
    assert len(joined) == len(trace) == 2
    for one, other in zip(joined, trace, strict=True):
        torch.testing.assert_close(one.energy, other.energy, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.readouts[0], other.readouts[0], rtol=1e-3, atol=1e-3)
        assert one.delta_norm.shape == (3,) and one.condition == other.condition


def without_guide(arguments):
    return {name: value for name, value in arguments.items() if name != "guide"}


def test_negative_prompts_are_for_all_images_or_one_for_each(tiny_pipeline):
    pipe, arguments = tiny_pipeline(), {"seeds": [0, 1], "num_inference_steps": 2, "guidance_scale": 2.0}
    plain = generate(pipe, PROMPTS[:2], **arguments)
    one, two = (generate(pipe, PROMPTS[:2], negative_prompt=words, **arguments) for words in ("dusk", ["dusk", ""]))
    assert (plain != one).flatten(1).any(1).all()
    assert torch.equal(two[0], one[0]) and torch.equal(two[1], plain[1])
    with pytest.raises(ValueError, match=r"negative_prompt: .*2.* 1.*\['dusk'\]"):
        generate(pipe, PROMPTS[:2], negative_prompt=["dusk"], **arguments)


def test_set_scheduler_keeps_the_shift_of_flow_matching():
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    set_scheduler(pipe, "flow_euler")
    assert type(pipe.scheduler).__name__ == SCHEDULERS["flow_euler"] and pipe.scheduler.config.shift == 3.0


VARIANCE_PRESERVING = [item for item in SCHEDULERS.items() if item[0] != "flow_euler"]


@pytest.mark.parametrize(("name", "class_name"), VARIANCE_PRESERVING)
def test_set_scheduler_keeps_the_noise_schedule(tiny_pipeline, name, class_name):
    pipe = tiny_pipeline(prediction_type="v_prediction")
    before = pipe.scheduler
    set_scheduler(pipe, name)
    assert type(pipe.scheduler).__name__ == class_name
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, before.alphas_cumprod)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "leading"
    assert generate(pipe, PROMPTS[:1], seeds=[0], num_inference_steps=2).isfinite().all()


def test_unknown_scheduler_is_named(tiny_pipeline):
    pipe = tiny_pipeline()
    before = pipe.scheduler
    words = r"scheduler: .*\['ddim', .*'pndm'\].*'DDIM'"
    with pytest.raises(ValueError, match=words):
        set_scheduler(pipe, "DDIM")
    assert pipe.scheduler is before


def test_keypoints_from_a_file_move_to_the_image_being_made(tmp_path):
    path = tmp_path / "pose.json"
    path.write_text(json.dumps({"size": [48, 64], "keypoints": [KEYPOINTS.tolist()] * 2}))
    same = load_control(path, (48, 64))
    assert same.dtype == torch.float32 and torch.equal(same, KEYPOINTS.expand(1, 2, -1, -1))
    moved = load_control(str(path), (24, 128))[0, 1]
    assert torch.equal(moved[:, 2], KEYPOINTS[:, 2])
    # Pixel centres at integers: the pixel's left border moves with the image, x' + 1/2 = (x + 1/2) * 128 / 64.
    torch.testing.assert_close(moved[:, 0] + 0.5, (KEYPOINTS[:, 0] + 0.5) * 2)
    torch.testing.assert_close(moved[:, 1] + 0.5, (KEYPOINTS[:, 1] + 0.5) / 2)
    torch.testing.assert_close(rescale(moved[:, :2], (24, 128), (48, 64)), KEYPOINTS[:, :2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "JSON"),
        ("[1, 2]", r"\[1, 2\]"),
        ('{"keypoints": []}', "size: expected this key, found none"),
        ('{"size": [64, 64]}', "keypoints: expected this key, found none"),
        ('{"size": [64], "keypoints": []}', r"size: .*2.* found \[64\]"),
        ('{"size": ["a", 1], "keypoints": []}', r"size\.0: .*integer, found 'a'"),
        ('{"size": [0, 64], "keypoints": []}', r"size\.0: .*1, found 0"),
        ('{"size": [64, 64], "keypoints": [[[0, 0, 1], [0]]]}', r"keypoints\.0\.1: .*3.* found \[0\]"),
        ('{"size": [64, 64], "keypoints": [[[0, 0, 1]]]}', r"keypoints\.0: .*18.* found \[\[0, 0, 1\]\]"),
        ('{"size": [64, 64], "keypoints": []}', "keypoints: .*1 person, found none"),
    ],
)
def test_a_damaged_pose_file_is_named(tmp_path, text, words):
    path = tmp_path / "pose.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"^control={path}: .*{words}"):
        load_control(path, (32, 32))


def test_a_missing_control_is_named(tmp_path):
    for name in ("pose.json", "pose.png"):
        with pytest.raises(FileNotFoundError, match=rf"control={tmp_path / name}: .*no such file"):
            load_control(tmp_path / name, (32, 32))


def test_an_image_is_written_and_read_back_as_a_control(tmp_path):
    levels = torch.arange(256) / 127.5 - 1
    image = levels.view(1, 16, 16).repeat(3, 1, 1)
    image[0] = image[0].flip(0)
    path = tmp_path / "new" / "image.png"
    save_image(image, path)
    assert [file.name for file in path.parent.iterdir()] == ["image.png"]
    control = load_control(path, (16, 16))
    assert np.array_equal(np.asarray(control)[..., 1].ravel(), np.arange(256))
    torch.testing.assert_close(FixedTarget(control).control[0], image)
    save_image(image * 3, path)
    torch.testing.assert_close(FixedTarget(Image.open(path)).control[0], (image * 3).clamp(-1, 1), rtol=0, atol=1 / 255)


def test_a_grey_image_is_a_control(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "depth.png")
    control = FixedTarget(load_control(tmp_path / "depth.png", (16, 16))).control
    torch.testing.assert_close(control, torch.tensor(grey).expand(1, 3, -1, -1) / 127.5 - 1)


@pytest.mark.parametrize("content", [b"", b"no image", b"half"])
def test_a_damaged_image_is_named(tmp_path, content):
    path = tmp_path / "control.png"
    Image.new("RGB", (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60] if content == b"half" else content)
    with pytest.raises(ValueError, match=f"control={path}: .*image.* found "):
        load_control(path, (64, 64))


def test_controls_of_other_modes_are_read_as_labels_are(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(grey).save(tmp_path / "depth.png")  # 16 bits
    assert np.array_equal(np.asarray(load_control(tmp_path / "depth.png", (16, 16)))[..., 0], grey // 257)
    Image.new("RGBA", (8, 8), (10, 20, 30, 255)).save(tmp_path / "control.png")
    assert load_control(tmp_path / "control.png", (8, 8)).getpixel((3, 3)) == (10, 20, 30)


def test_seeds_of_images_follow_their_indices_and_runs_share_none():
    assert image_seeds(2, [0, 5]) == [2_000_006, 2_000_011]
    assert not set(image_seeds(0, range(1000))) & set(image_seeds(1, range(1000)))


def test_a_controlnets_image_is_a_file_cut_to_the_size_of_the_images(tmp_path, tokenizer, tiny_pipeline):
    from tests import families

    pixels = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "control.png")
    asked = OmegaConf.create({"image": str(tmp_path / "control.png"), "num_inference_steps": 3})
    backbone = DiffusionBackbone(families.build("sd15_controlnet", tokenizer))
    given = check_sampling(backbone, asked)
    assert given["image"].size == (32, 32) and given["num_inference_steps"] == 3
    with pytest.raises(ValueError, match=r"none\.png"):
        check_sampling(backbone, OmegaConf.create({"image": str(tmp_path / "none.png")}))
    with pytest.raises(ValueError, match="sampling.image: .*takes no such setting"):
        check_sampling(DiffusionBackbone(tiny_pipeline()), asked)


@pytest.mark.parametrize("update", [None, "score", "mpgd"])
def test_who_watches_sees_every_step_changes_nothing_and_may_end_the_run(tiny_pipeline, tiny_head, poses, update):
    pipe, seen = tiny_pipeline(), []
    terms = [GuidanceTerm(tiny_head(pipe.unet, variant="keypoints"), FixedTarget(poses(1)))]
    guidance = None if update is None else ReadoutGuidance(terms, update=update)
    asked = {"seeds": [0], "num_inference_steps": 4, "guidance_scale": 2.0, "guidance": guidance}
    plain = generate(pipe, ["a person"], **asked)
    with watched(pipe, lambda what, latents: seen.append((what, latents)), "guided"):
        assert torch.equal(generate(pipe, ["a person"], **asked), plain)
    assert [what for what, _ in seen] == ["guided"] * 4
    # The last step's x0 is the image, but for the noise of t = 0, at which DDIM ends.
    if update != "mpgd":  # which moves what the scheduler gave
        last = DiffusionBackbone(pipe).decode(seen[-1][1])
        torch.testing.assert_close(last, plain, atol=1e-2, rtol=0)

    def end(what, latents):
        raise InterruptedError

    with pytest.raises(InterruptedError), watched(pipe, end, "guided"):
        generate(pipe, ["a person"], **asked)
    assert "step" not in vars(pipe.scheduler) and not hasattr(pipe.unet, "_diffusers_hook")
    assert torch.equal(generate(pipe, ["a person"], **asked), plain)
