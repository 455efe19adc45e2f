"""How users call a guided pipeline: what they pass, what they switch while it runs, and which pipeline runs."""

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from diffusers.image_processor import PixArtImageProcessor

from rg.backbone.conditions import encode_condition
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget, ReferenceTarget, uncut
from rg.heads.protocol import EnergyHead, FunctionHead
from rg.points import rescale
from tests.families import build, denoise


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


# The same, read under the empty prompt.
prompted = FunctionHead(brightness, prompt="")


class Look(EnergyHead):
    """The finest tap is the readout; the energy its mean square distance from the target, and a shift's."""

    prompt = ""
    seen: list

    def __init__(self):
        self.seen = []

    def __call__(self, features, time_embedding):
        return features[-1]

    def energy(self, readout, target, *, shift=None):
        target = target if shift is None else target + shift.view(-1, 1, 1, 1)
        return (readout - target).square().flatten(1).mean(1)

    def encode_target(self, control, *, readout_size, image_size):
        self.seen.append((control, readout_size, image_size))
        return control[..., :1, :1]


def strong(head=prompted, **settings):
    return ReadoutGuidance(
        [GuidanceTerm(head)], **{"branch": "uncond", **{"readout_scale": 0.5, "normalize": "rms"} | settings}
    )


@pytest.mark.parametrize("settings", [{}, {"update": "adam", "branch": "both", "learning_rate": 0.1}])
@pytest.mark.parametrize("family", ["sd15", "sdxl_adapter", "sd15_inpaint", "pixart"])
def test_inference_mode_around_a_call_changes_nothing(tokenizer, family, settings):
    pipe = build(family, tokenizer)
    guided = denoise(pipe, family, strong(**settings), steps=2)
    with torch.inference_mode():
        control = torch.zeros(1, 24 if family == "pixart" else 8, 1, 1)
        assert torch.equal(denoise(pipe, family, strong(**settings), steps=2), guided)
    assert not encode_condition(pipe, "").text.is_inference()
    # What was made inside: a control, per-image arguments, a recording.
    reference, head = ReferenceTarget(), Look()
    with torch.inference_mode():
        terms = [GuidanceTerm(head, FixedTarget(control), arguments={"shift": torch.ones(2)})]
        guidance = ReadoutGuidance([*terms, GuidanceTerm(head, reference)], **{"branch": "uncond", **settings})
        with guidance.record(pipe):
            denoise(pipe, family, steps=2)
    denoise(pipe, family, guidance, steps=2)
    assert len(guidance.trace) == 2 and (guidance.trace[0].gradient_norm > 0).all()


def test_weights_made_in_inference_mode_are_named(tokenizer, tiny_head):
    with torch.inference_mode():
        inside = build("sd15", tokenizer)
    with pytest.raises(ValueError, match=r"denoiser: .*outside of torch.inference_mode\(\)"), strong().attach(inside):
        pass
    pipe = build("sd15", tokenizer)
    with torch.inference_mode():
        head = tiny_head(pipe.unet, variant="rgb")
    term = GuidanceTerm(head, FixedTarget(torch.zeros(1, 3, 32, 32)))
    with pytest.raises(ValueError, match=r"head: .*outside of torch.inference_mode\(\)"):
        denoise(pipe, "sd15", ReadoutGuidance([term], branch="uncond"))
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"denoiser: .*moved by offloading.*torch.no_grad"), torch.inference_mode():
        denoise(pipe, "sd15", strong())


def test_controls_and_arguments_repeat_as_prompts_do(tokenizer):
    pipe = build("sd15", tokenizer)
    controls, shifts = torch.tensor([0.0, 3.0]).view(2, 1, 1, 1), torch.tensor([0.5, -0.5])
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(controls, shifts, **arguments):
        term = GuidanceTerm(Look(), FixedTarget(controls.expand(-1, 8, -1, -1)), arguments={"shift": shifts})
        guidance = ReadoutGuidance([term], branch="both", readout_scale=10.0)
        return denoise(pipe, "sd15", guidance, steps=2, generator=None, latents=latents, **arguments)

    prompts = ["grass", "a person"]
    expected = run(controls[[0, 0, 1, 1]], shifts[[0, 0, 1, 1]], prompt=["grass", "grass", "a person", "a person"])
    two = {"prompt": prompts, "num_images_per_prompt": 2}
    for given in ((controls, shifts), (controls[[0, 0, 1, 1]], shifts), (controls, shifts[[0, 0, 1, 1]])):
        torch.testing.assert_close(run(*given, **two), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"control: expected 1 or 4 .*, or 2, one per prompt, got 3"):
        run(controls[[0, 0, 1]], shifts, **two)
    with pytest.raises(ValueError, match="arguments: expected 1 or 4 of them, one per image, got 2"):
        run(controls[[0, 0, 1, 1]], shifts, prompt=prompts * 2)
    reference = ReferenceTarget()
    guidance = ReadoutGuidance([GuidanceTerm(Look(), reference)], readout_scale=0.0, branch="uncond")
    with guidance.record(pipe):
        denoise(pipe, "sd15", steps=2, generator=None, latents=latents[[0, 2]])
    denoise(pipe, "sd15", guidance, steps=2, generator=None, latents=latents[[0, 0, 2, 2]], **two)
    assert (guidance.trace[0].energy < 1e-8).all()


@pytest.mark.parametrize("ran_before", [False, True])
def test_the_pipeline_that_runs_is_the_one_that_is_guided(tokenizer, ran_before):
    pipe = build("sd15", tokenizer)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    if ran_before:
        denoise(pipe, "sd15", steps=2)
    plain = denoise(other, "sd15_img2img", steps=5)
    for attach in (strong().attach, ReadoutGuidance([GuidanceTerm(Look(), ReferenceTarget())], branch="uncond").record):
        with attach(pipe):
            for _ in range(2):
                with pytest.raises(ValueError, match="StableDiffusionPipeline, got one of StableDiffusionImg2ImgPipel"):
                    denoise(other, "sd15_img2img", steps=5)
            with pytest.raises(ValueError, match="got a call from outside it"):
                pipe.unet(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 3, 8))
    guidance = strong(stop=0.5)
    assert not torch.allclose(denoise(other, "sd15_img2img", guidance, steps=5), plain, atol=1e-2)
    assert [step.step for step in guidance.trace] == [0, 1]


class Twice(StableDiffusionPipeline):
    """A pipeline of a user's own that calls its U-Net twice a step."""

    def __call__(self, *given, **others):
        return super().__call__(*given, **others)

    def progress_bar(self, **arguments):
        forward = self.unet.forward
        self.unet.forward = lambda *given, **others: (forward(*given, **others), forward(*given, **others))[1]
        return super().progress_bar(**arguments)


def test_a_pipeline_that_calls_its_denoiser_otherwise_is_named(tokenizer):
    pipe = Twice(**build("sd15", tokenizer).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"for each of the scheduler's timesteps.* got t=751 as call 1 of Twice"):
        denoise(pipe, "sd15", strong())


@pytest.mark.parametrize("loaded", ["before", "inside", "both"])
def test_lora_comes_and_goes_inside(tokenizer, tmp_path, loaded):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    trained, pipe = build("sd15", tokenizer), build("sd15", tokenizer)
    settings = {"r": 2, "lora_alpha": 2, "init_lora_weights": False, "target_modules": ["to_q", "conv2"]}
    trained.unet.add_adapter(peft.LoraConfig(**settings))
    layers = peft.get_peft_model_state_dict(trained.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    guided = denoise(pipe, "sd15", strong(), steps=2)
    adapted = denoise(trained, "sd15", strong(), steps=2)
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    if loaded != "inside":
        pipe.load_lora_weights(tmp_path)
        before = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    with strong().attach(pipe):
        if loaded == "inside":
            torch.testing.assert_close(denoise(pipe, "sd15", steps=2), guided)
            pipe.load_lora_weights(tmp_path)
        torch.testing.assert_close(denoise(pipe, "sd15", steps=2), adapted, rtol=1e-4, atol=1e-4)
        if loaded != "inside":
            pipe.unload_lora_weights()
            torch.testing.assert_close(denoise(pipe, "sd15", steps=2), guided, rtol=1e-4, atol=1e-4)
        if loaded == "both":
            pipe.load_lora_weights(tmp_path)
            torch.testing.assert_close(denoise(pipe, "sd15", steps=2), adapted, rtol=1e-4, atol=1e-4)
    assert not hasattr(pipe.unet, "_diffusers_hook")
    after = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    if loaded == "both":
        assert after == before
    elif loaded == "before":
        assert after == {name.replace(".base_layer", ""): flag for name, flag in before.items() if "lora_" not in name}
    else:
        own = {name.replace(".base_layer", ""): flag for name, flag in after.items() if "lora_" not in name}
        assert own == flags


def test_a_scheduler_replaced_inside_is_noticed_at_the_next_call(tokenizer):
    pipe = build("sd15", tokenizer)
    own, euler = pipe.scheduler, EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with strong(update="adam").attach(pipe):
        pipe.scheduler = euler
        with pytest.raises(ValueError, match="update=adam is defined for DDIMScheduler, got EulerDiscreteScheduler"):
            denoise(pipe, "sd15")
        pipe.scheduler = DDIMScheduler.from_config(own.config)
        with pytest.raises(ValueError, match="the one that guidance was attached with, got another DDIMScheduler"):
            denoise(pipe, "sd15")
        pipe.scheduler = own
        denoise(pipe, "sd15", steps=2)
    guidance = strong()
    with guidance.attach(pipe):
        pipe.scheduler = euler
        inside = denoise(pipe, "sd15", steps=2)
        pipe.scheduler = DDIMScheduler.from_config(own.config, prediction_type="sample")
        with pytest.raises(ValueError, match="prediction_type is 'sample'"):
            denoise(pipe, "sd15", steps=2)
    pipe.scheduler = euler
    assert torch.equal(denoise(pipe, "sd15", strong(), steps=2), inside)


def test_a_small_autoencoder(tokenizer):
    pipe = build("sd15", tokenizer)
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    pipe.vae = AutoencoderTiny(**widths, num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1)).eval()
    backbone = DiffusionBackbone(pipe)
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = backbone.encode(images)
    assert mean.shape == std.shape == (2, 4, 8, 12) and not std.any()
    assert torch.equal(mean, pipe.vae.encode(images).latents)
    assert torch.equal(backbone.decode(mean), pipe.vae.decode(mean).sample.clamp(-1, 1))
    assert len(backbone.autoencoder_id) == 16
    assert invert(backbone, mean, num_inference_steps=2).shape == mean.shape
    images = denoise(pipe, "sd15", strong(), steps=2, output_type="pt")
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    assert denoise(build("sd15", tokenizer).to(torch.float32), "sd15", strong(), steps=2).shape == (2, 4, 8, 8)


def test_a_control_lies_on_the_image_that_a_transformer_pipeline_cuts_out(tokenizer):
    pipe = build("pixart", tokenizer)
    pipe.transformer.register_to_config(sample_size=32)  # its pipeline bins sizes of about 256x256 pixels
    head, asked, made = Look(), (200, 300), (208, 304)
    guidance = ReadoutGuidance(
        [GuidanceTerm(head, FixedTarget(torch.zeros(1, 24, 1, 1)))], readout_scale=0.0, branch="uncond"
    )
    sizes = {"height": asked[0], "width": asked[1], "use_resolution_binning": True}
    images = denoise(pipe, "pixart", guidance, images=1, steps=1, output_type="pt", **sizes)
    assert images.shape[-2:] == asked
    assert head.seen[0][2] == (205, 300)  # of which 2 rows are cut off above, 3 below
    denoise(pipe, "pixart", guidance, images=1, steps=1, size=made)
    assert head.seen[1][2] == made  # asked of the same pipeline without bins
    # Every pixel that comes out says where it was in the image that was made: there its keypoint lies.
    ramp = torch.stack(torch.meshgrid(torch.arange(made[1]), torch.arange(made[0]), indexing="xy")).float()[None]
    shown = PixArtImageProcessor.resize_and_crop_tensor(ramp, asked[1], asked[0])
    keypoints = torch.tensor([[30.0, 40, 1], [270, 10, 1]]).repeat(9, 1)[None, None]
    moved, size = uncut(keypoints, asked, made)
    there = rescale(moved[0, 0, :2, :2], size, made)
    torch.testing.assert_close(there, torch.stack([shown[0, :, 40, 30], shown[0, :, 10, 270]]), rtol=0, atol=0.01)
    # An image of the control is the same there as what was cut.
    image, size = uncut(shown, asked, made)
    back = torch.nn.functional.interpolate(image, size=made, mode="bilinear")
    torch.testing.assert_close(back[..., 8:-8, 8:-8], ramp[..., 8:-8, 8:-8], rtol=0, atol=0.6)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("settings", [{"normalize": "rms", "readout_scale": 1.0}, {"normalize": None}])
def test_zero_terminal_snr_is_bounded_as_with_ddim(tokenizer, scheduler, settings):
    largest, final = {}, {}
    for kind in (DDIMScheduler, scheduler):
        pipe = build("sd15", tokenizer, prediction_type="v_prediction")
        changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
        guidance = ReadoutGuidance([GuidanceTerm(prompted)], **{"branch": "uncond", **settings})
        final[kind] = denoise(pipe, "sd15", guidance, steps=10).abs().max()
        largest[kind] = max(step.delta_norm.max() for step in guidance.trace)
        assert not guidance.trace[0].delta_norm.any()
    assert largest[scheduler] < 2 * largest[DDIMScheduler] and final[scheduler] < 2 * final[DDIMScheduler]


@pytest.mark.parametrize("branch", ["uncond", "cond", "both"])
def test_a_callback_may_end_text_guidance(tokenizer, branch):
    pipe = build("sd15", tokenizer)

    def end(pipe, step, _timestep, given):
        if step == 1:
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    given = {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    plain = denoise(pipe, "sd15", **given)
    guidance = strong(branch=branch, readout_scale=0.0)
    torch.testing.assert_close(denoise(pipe, "sd15", guidance, **given), plain, rtol=1e-5, atol=1e-5)
    assert [len(step.energy) for step in guidance.trace] == [2] * 4
    conditions = ["shared", "shared", "own", "own"] if branch == "uncond" else ["shared"] * 4
    assert [step.condition for step in guidance.trace] == conditions

    # An interrupted run is followed by a whole one.
    def interrupt(pipe, _step, _timestep, given):
        pipe._interrupt = True
        return given

    denoise(pipe, "sd15", guidance, callback_on_step_end=interrupt)
    assert len(guidance.trace) == 1
    denoise(pipe, "sd15", guidance)
    assert [step.step for step in guidance.trace] == [0, 1, 2, 3]


def embeddings(pipe, family, prompt, images):
    """A prompt and the empty negative one as a pipeline's own embeddings."""
    if family == "pixart":
        encoded = pipe.encode_prompt(prompt, negative_prompt="", device="cpu")
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    else:
        flags = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True, "device": "cpu"}
        encoded = pipe.encode_prompt(prompt, negative_prompt="", **flags)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = {name: value.detach() for name, value in zip(names, encoded, strict=False)}
    return {name: value.repeat(images, *[1] * (value.ndim - 1)) for name, value in given.items()}


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart"])
def test_prompts_as_text_lists_and_embeddings_and_one_generator_or_many(tokenizer, family):
    pipe, prompt = build(family, tokenizer), "a person on grass"
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    start = {"latents": latents, "steps": 2, "generator": torch.Generator().manual_seed(0)}
    listed = denoise(pipe, family, strong(), prompt=[prompt] * 2, negative_prompt=_empty(family), **start)
    text = denoise(pipe, family, strong(), prompt=prompt, negative_prompt="", num_images_per_prompt=2, **start)
    torch.testing.assert_close(text, listed, rtol=1e-5, atol=1e-5)
    given = {"prompt": None, "negative_prompt": None, **embeddings(pipe, family, prompt, 2)}
    guidance = strong()
    torch.testing.assert_close(denoise(pipe, family, guidance, **start, **given), listed, rtol=1e-5, atol=1e-5)
    assert {step.condition for step in guidance.trace} == {"shared"}


def _empty(family):
    return "" if family == "pixart" else [""] * 2


@pytest.mark.parametrize("family", ["sd15", "sdxl", "pixart"])
def test_tiles_slices_and_odd_sizes(tokenizer, family):
    pipe = build(family, tokenizer)
    size = {"size": (40, 56), "output_type": "pt", "steps": 2}
    expected = denoise(pipe, family, strong(), **size)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(denoise(pipe, family, strong(), **size), expected, rtol=1e-4, atol=1e-4)
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 4
    tiled = denoise(pipe, family, strong(), **size)
    assert tiled.shape == expected.shape == (2, 3, 40, 56) and tiled.isfinite().all()
    backbone = DiffusionBackbone(pipe)
    assert backbone.decode(backbone.encode(torch.zeros(1, 3, 40, 56))[0]).shape == (1, 3, 40, 56)


def test_a_visible_keypoint_without_a_place_is_refused_and_a_hidden_one_is_not_read(poses):
    pose = poses(1)
    pose[0, 0, 3, 0] = float("nan")
    with pytest.raises(ValueError, match="control: .*nan"):
        FixedTarget(pose)
    pose[0, 0, 3, 2] = 0
    assert FixedTarget(pose).control is not None
