"""What users do to a pipeline before guidance is attached: offload it, compile it, change its attention, adapt it."""

import importlib.util
import logging

import accelerate
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPanoramaPipeline,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from rg.backbone.denoiser import denoiser_of
from rg.backbone.diffusion import DiffusionBackbone
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.targets import FixedTarget
from rg.heads.protocol import FunctionHead
from tests.families import FLOW_MODELS, build, denoise, mostly_slow


def brightness(features, time_embedding):
    """A head that is a plain function: the mean square of the finest tap."""
    return features[-1].square().flatten(1).mean(1)


# The same, read under the empty prompt.
prompted = FunctionHead(brightness, prompt="")


def strong(head=prompted):
    return ReadoutGuidance([GuidanceTerm(head)], readout_scale=0.5, normalize="rms", branch="uncond")


@pytest.mark.parametrize(
    "family", mostly_slow(["sd15", "sdxl", "sdxl_controlnet", "pixart", *FLOW_MODELS], ("sd15", "sdxl", "pixart"))
)
def test_model_offload(tokenizer, family):
    # On the CPU as the device that computes: the same hooks, and the same exchange of them after every call.
    plain, guided = (denoise(build(family, tokenizer), family, guidance) for guidance in (None, strong()))
    pipe = build(family, tokenizer)
    pipe.enable_model_cpu_offload(device="cpu")
    guidance = strong()
    with guidance.attach(pipe):
        for _ in range(2):
            torch.testing.assert_close(denoise(pipe, family), guided)
            assert len(guidance.trace) == 4
            guidance.trace.clear()
    assert "readout_guidance" not in repr(getattr(denoiser_of(pipe), "_diffusers_hook", ""))
    torch.testing.assert_close(denoise(pipe, family), plain)
    assert not guidance.trace
    pipe.remove_all_hooks()
    torch.testing.assert_close(denoise(pipe, family), plain)
    assert not hasattr(denoiser_of(pipe), "_old_forward")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sequential_offload(tokenizer, checkpointing):
    guided = denoise(build("sd15", tokenizer), "sd15", strong())
    pipe = build("sd15", tokenizer)
    accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in pipe.unet.parameters())
    guidance = ReadoutGuidance(
        [GuidanceTerm(prompted)],
        readout_scale=0.5,
        normalize="rms",
        checkpointing=checkpointing,
        branch="uncond",
    )
    torch.testing.assert_close(denoise(pipe, "sd15", guidance), guided, rtol=1e-4, atol=1e-4)
    assert all(parameter.device.type == "meta" and parameter.requires_grad for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("move", ["enable_group_offload", "enable_layerwise_casting"])
def test_hooks_that_move_weights_away_are_refused(tokenizer, move):
    pipe = build("sd15", tokenizer)
    if move == "enable_group_offload":
        pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    else:
        pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="expected the denoiser's weights to stay in place until the backward pass"):
        denoise(pipe, "sd15", strong())


def by_processor(processor):
    return lambda pipe: pipe.unet.set_attn_processor(processor())


@pytest.mark.parametrize(
    "change",
    [
        by_processor(AttnProcessor),
        by_processor(AttnProcessor2_0),
        lambda pipe: pipe.enable_attention_slicing(1),
        lambda pipe: pipe.unet.set_attention_backend("_native_math"),
        lambda pipe: pipe.unet.fuse_qkv_projections(),
        lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    ],
    ids=["eager", "sdpa", "sliced", "backend", "fused", "channels_last"],
)
def test_attention_backends(tokenizer, change):
    guided = denoise(build("sd15", tokenizer), "sd15", strong())
    pipe = build("sd15", tokenizer)
    change(pipe)
    torch.testing.assert_close(denoise(pipe, "sd15", strong()), guided, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("where", ["whole", "block", "wrapper"])
@pytest.mark.parametrize(("family", "part"), [("sd15", "unet"), ("pixart", "transformer")])
def test_compiled_parts_that_hold_taps_run_uncompiled_and_say_so(tokenizer, family, part, where, caplog):
    guided = denoise(build(family, tokenizer), family, strong())
    pipe = build(family, tokenizer)
    denoiser = getattr(pipe, part)
    if where == "whole":
        denoiser.compile(backend="eager")
    elif where == "block":
        (denoiser.up_blocks if family == "sd15" else denoiser.transformer_blocks)[0].compile(backend="eager")
    else:
        setattr(pipe, part, torch.compile(denoiser, backend="eager"))
    denoiser = getattr(pipe, part)
    compiled = [module._compiled_call_impl for module in denoiser.modules()]
    with caplog.at_level(logging.WARNING, "rg.guidance.attach"):
        torch.testing.assert_close(denoise(pipe, family, strong()), guided)
    assert "run uncompiled while guidance is attached" in caplog.text
    assert getattr(pipe, part) is denoiser
    assert [module._compiled_call_impl for module in denoiser.modules()] == compiled


@pytest.mark.slow
def test_compiled_attention_blocks_stay_compiled(tokenizer, caplog):
    guided = denoise(build("sdxl", tokenizer), "sdxl", strong())
    pipe = build("sdxl", tokenizer)
    pipe.unet.compile_repeated_blocks(backend="aot_eager")
    with caplog.at_level(logging.WARNING, "rg.guidance.attach"):
        torch.testing.assert_close(denoise(pipe, "sdxl", strong()), guided, rtol=1e-4, atol=1e-4)
    assert "uncompiled" not in caplog.text


def test_a_wrapped_block_is_named(tokenizer):
    pipe = build("sd15", tokenizer)
    pipe.unet.up_blocks[0] = torch.compile(pipe.unet.up_blocks[0], backend="eager")
    with pytest.raises(ValueError, match=r"expected up_blocks.0 compiled in place \(.compile\(\)\)"):
        denoise(pipe, "sd15", strong())


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs peft")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("targets", [["to_q", "to_v"], ["to_q", "conv2", "linear_2"]])
def test_lora_on_top(tokenizer, tiny_head, tmp_path, family, targets):
    from peft import LoraConfig

    pipe = build(family, tokenizer)
    head = tiny_head(pipe.unet, variant="rgb")
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets), "mine")
    plain = denoise(pipe, family)
    flags = {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}
    assert set(flags.values()) == {True, False}
    target = FixedTarget(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(
        denoise(pipe, family, ReadoutGuidance([GuidanceTerm(head, target)], readout_scale=0.0, branch="uncond")), plain
    )
    guidance, unguided = strong(), ReadoutGuidance([GuidanceTerm(prompted)], readout_scale=0.0, branch="uncond")
    denoise(pipe, family, unguided)
    assert not torch.allclose(denoise(pipe, family, guidance), plain, atol=1e-2)
    assert (guidance.trace[-1].energy < unguided.trace[-1].energy).all()
    assert {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()} == flags


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="LoRA needs peft")
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_lora_from_a_file(tokenizer, tmp_path, family):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained, pipe = build(family, tokenizer), build(family, tokenizer)
    trained.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    trained.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(trained.unet))
    plain, guided = denoise(pipe, family), denoise(pipe, family, strong())
    pipe.load_lora_weights(tmp_path)
    adapted = denoise(pipe, family, strong())
    torch.testing.assert_close(adapted, denoise(trained, family, strong()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, guided, atol=1e-3)
    # What heads are trained on is the adapted model too.
    x_t, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    one, other = (DiffusionBackbone(each).predict(x_t, timesteps).features[-1] for each in (pipe, trained))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(denoise(pipe, family), plain, rtol=1e-4, atol=1e-4)


def refuse(pipe, guidance, words):
    with pytest.raises(ValueError, match=words), guidance.attach(pipe):
        pass


def other_transformers():
    """Pipelines around transformers that have no taps: tiny ones of DiT and AuraFlow."""
    heads = {"num_attention_heads": 2, "attention_head_dim": 8}
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    aura = AuraFlowTransformer2DModel(
        **heads, num_mmdit_layers=1, num_single_dit_layers=1, joint_attention_dim=8, caption_projection_dim=16
    )
    return [
        DiTPipeline(DiTTransformer2DModel(sample_size=8, norm_num_groups=4, **heads), vae, DDPMScheduler()),
        AuraFlowPipeline(None, None, vae, aura, FlowMatchEulerDiscreteScheduler()),
    ]


def test_pipelines_without_the_taps_are_named():
    words = r"expected a U-Net as pipe.unet \(Stable Diffusion 1, 2, SDXL\) or the transformer of PixArt, .* as"
    for pipe in other_transformers():
        refuse(pipe, strong(), rf"{words} .*, got a {type(pipe).__name__} of \[.*'transformer'.*\]")
        with pytest.raises(ValueError, match=words):
            DiffusionBackbone(pipe)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(block_out_channels=(8,), norm_num_groups=4, **blocks)
    refuse(DDPMPipeline(unet, DDPMScheduler()), strong(), "makes images from text, got a DDPMPipeline")


def test_pipelines_whose_batch_is_not_images_are_named(tokenizer):
    parts = build("sd15", tokenizer).components
    parts = {name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    small = {"motion_layers_per_block": 1, "motion_norm_num_groups": 4, "motion_num_attention_heads": 2}
    motion = MotionAdapter(block_out_channels=(8, 16), **small)
    frames = AnimateDiffPipeline(**parts, motion_adapter=motion)
    others = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    for pipe, words in (
        (frames, "expected a batch of images, num_images_per_prompt of each text, got a AnimateDiffPipeline"),
        (StableDiffusionPanoramaPipeline(**parts, **others), "StableDiffusionPanoramaPipeline has one per window"),
    ):
        for attach in (strong().attach, DiffusionBackbone):
            with pytest.raises(ValueError, match=words), attach(pipe):
                pass


def test_three_branches_are_refused(tokenizer):
    parts = build("sd15", tokenizer).components
    refuse(StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False), strong(), "has three")
    pipe = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers="mid")
    pipe.set_progress_bar_config(disable=True)
    before = pipe.unet.forward
    with pytest.raises(ValueError, match="perturbed attention adds a third branch"), strong().attach(pipe):
        pipe("a person", num_inference_steps=2, output_type="latent")
    assert pipe.unet.forward == before


def test_heads_that_do_not_fit_are_named_and_the_pipeline_is_left_alone(tokenizer, tiny_head):
    pipe = build("sd21", tokenizer)
    other = build("sd15", tokenizer)
    target = FixedTarget(torch.zeros(1, 3, 32, 32))
    foreign = tiny_head(other.unet, variant="rgb", condition_dim=other.unet.config.cross_attention_dim)
    before = dict(vars(pipe.unet))
    for head, words in (
        (foreign, "another model family with the same taps: it expects text embeddings of width 8, .* have 12"),
        (tiny_head(pipe.unet, variant="rgb").half(), "head: expected float32 weights.*, got torch.float16"),
        (tiny_head(pipe.unet, variant="rgb").to("meta"), "head: expected it on the pipeline's cpu, got meta"),
    ):
        refuse(pipe, ReadoutGuidance([GuidanceTerm(head, target)], branch="uncond"), words)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    refuse(pipe, strong(), "got FlowMatchEulerDiscreteScheduler")
    pipe.scheduler = EulerDiscreteScheduler()
    adam = ReadoutGuidance([GuidanceTerm(brightness)], update="adam", branch="uncond")
    refuse(pipe, adam, "DDIMScheduler, got EulerDiscreteScheduler")
    pipe.text_encoder = None
    refuse(pipe, strong(), "has no text encoder to embed it: expected pipe.text_encoder, got None")
    assert vars(pipe.unet) == before
