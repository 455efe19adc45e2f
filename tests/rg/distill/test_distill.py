"""From a head to an adapter of diffusers: losses, the folder, its use, and what is refused."""

import json

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionAdapterPipeline, T2IAdapter
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from rg import FixedTarget, GuidanceTerm, ReadoutGuidance
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import CONF
from rg.distill.__main__ import distill
from rg.distill.networks import load_adapter, make_adapter, with_adapter
from rg.distill.student import AdapterStudent
from rg.generation import generate
from rg.heads import load_head
from rg.heads.spatial import SpatialHead
from tests.families import build


@pytest.fixture(scope="module")
def backbone():
    return DiffusionBackbone.from_pretrained("marionette", device="cpu")


def tiny_head(backbone, variant="keypoints"):
    widths = {name: getattr(backbone, name) for name in ("tap_channels", "time_embed_dim", "condition_dim")}
    form = {"projection_dim": 16, "norm_groups": 2, "hidden_channels": 8}
    return SpatialHead(variant=variant, **form, **widths).eval().requires_grad_(False)


def a_batch(backbone, count=2):
    torch.manual_seed(0)
    channels, (height, width) = backbone.latent_channels, backbone.latent_size
    pose = torch.rand(count, 1, 18, 3) * backbone.resolution[0]
    pose[..., 2] = 1
    return {
        "label": torch.rand(count, 3, *backbone.resolution) * 2 - 1,
        "keypoints": pose,
        "latent_mean": torch.randn(count, channels, height, width),
        "latent_std": torch.full((count, channels, height, width), 0.1),
        "prompt": ["a person"] * count,
        "index": torch.arange(count),
        "epoch": torch.zeros(count, dtype=torch.int64),
    }


@pytest.mark.parametrize("kind", ["t2i_adapter", "controlnet"])
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_every_weight_of_an_adapter_learns_and_none_of_the_model(family, kind, tokenizer):
    tiny = DiffusionBackbone(build(family, tokenizer))
    student = AdapterStudent(kind=kind, energy_weight=0.5, empty=0.0).attach(tiny, tiny_head(tiny))
    denoising, energy = student.losses(a_batch(tiny), student.draw(a_batch(tiny)))
    (denoising + energy).backward()
    learnt = {name for name, p in student.adapter.named_parameters() if p.grad is not None}
    # A ControlNet's last convolutions begin at zero: they alone get a gradient in the first step.
    assert learnt
    if kind == "t2i_adapter":
        assert learnt == {name for name, _ in student.adapter.named_parameters()}
    assert all(p.grad is None for p in tiny.denoiser.parameters())
    assert all(name.startswith("adapter.") for name in student.state_dict())


def test_the_head_is_not_asked_where_little_can_be_read(backbone):
    student = AdapterStudent(energy_until=920).attach(backbone, tiny_head(backbone))
    batch = a_batch(backbone)
    latents, noise, _, prompts = student.draw(batch)
    energies = []
    for times in ([500, 980], [500, 500], [980, 980]):
        drawn = (latents, noise, torch.tensor(times), prompts)
        energies.append(student.losses(batch, drawn)[1].item())
    alone = {key: value[:1] for key, value in batch.items()}
    own = student.losses(alone, (latents[:1], noise[:1], torch.tensor([500]), prompts[:1]))[1].item()
    assert energies[0] == pytest.approx(own, rel=1e-4)
    assert energies[1] != pytest.approx(own, rel=1e-4)
    assert energies[2] == 0


@pytest.mark.parametrize("kind", ["t2i_adapter", "controlnet"])
@pytest.mark.slow
def test_an_adapter_lowers_what_it_is_trained_for(backbone, kind):
    student = AdapterStudent(kind=kind, empty=0.0).attach(backbone, load_head("pose_8k5"))
    batch = a_batch(backbone)
    latents, noise, _, prompts = student.draw(batch)
    drawn = (latents, noise, torch.tensor([400, 700]), prompts)
    optimizer, totals = torch.optim.AdamW(student.adapter.parameters(), lr=1e-3), []
    for _ in range(12):
        total = sum(student.losses(batch, drawn))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.9 * totals[0]


def test_a_draw_depends_on_sample_and_count_alone(backbone):
    student = AdapterStudent().attach(backbone, tiny_head(backbone))
    batch = a_batch(backbone)
    turned = {key: value.flip(0) if isinstance(value, torch.Tensor) else value[::-1] for key, value in batch.items()}
    for one, other in zip(student.draw(batch)[:3], student.draw(turned)[:3], strict=True):
        assert torch.equal(one, other.flip(0))
    later = student.draw({**batch, "epoch": torch.ones(2, dtype=torch.int64)})
    assert not torch.equal(later[1], student.draw(batch)[1])


@pytest.mark.parametrize("kind", ["t2i_adapter", "controlnet"])
def test_a_saved_adapter_runs_in_diffusers_own_pipeline_also_in_half_precision_and_guided(backbone, kind, tmp_path):
    made = make_adapter(kind, backbone.denoiser, pixels=4)
    made.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path)
    assert isinstance(loaded, {"t2i_adapter": T2IAdapter, "controlnet": ControlNetModel}[kind])
    pipe = with_adapter(backbone.pipeline, loaded)
    sampling = {"seeds": [1, 2], "num_inference_steps": 2, "guidance_scale": 2.0}
    controls = torch.rand(2, 3, 64, 64)
    plain = generate(pipe, ["a person"] * 2, image=controls, **sampling)
    assert torch.equal(plain, generate(pipe, ["a person"] * 2, image=controls, **sampling))
    if kind == "t2i_adapter":
        assert not torch.equal(plain, generate(pipe, ["a person"] * 2, image=controls.flip(0), **sampling))
        half = T2IAdapter.from_pretrained(tmp_path, torch_dtype=torch.float16)
        assert all(part.isfinite().all() for part in half(controls.half()))
    pose = a_batch(backbone)["keypoints"]
    guidance = ReadoutGuidance([GuidanceTerm(load_head("pose_8k5"), FixedTarget(pose))])
    guided = generate(pipe, ["a person"] * 2, guidance=guidance, image=controls, **sampling)
    assert not torch.equal(plain, guided)


def run(folder, *overrides, name="run"):
    words = ["+experiment=distill_pose", "~logger.wandb", f"run_dir={folder / name}", "trainer.max_steps=4"]
    words += [f"data.builder.root={folder / 'own'}", "data.size=4", "data.val_size=2", "data.batch_size=2"]
    words += ["pictures.steps=2", "pictures.least=0.0", "data.epoch_batches=4", "trainer.accelerator=cpu"]
    words += ["trainer.log_every_n_steps=1"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("distill", [*words, *overrides])
    return distill(config, folder / name)


@pytest.mark.slow
def test_a_head_becomes_a_folder_that_resumes_and_has_a_card(tmp_path, capsys):
    folder = run(tmp_path)
    first = load_file(folder / "diffusion_pytorch_model.safetensors")
    text = (folder / "README.md").read_text()
    assert "4 pictures with readings of the head `pose_8k5`" in text and "skeleton" in text
    assert type(StableDiffusionAdapterPipeline) is type and T2IAdapter.from_pretrained(folder) is not None
    shards = sorted((tmp_path / "own" / "train").iterdir())
    stamps = [path.stat().st_mtime_ns for path in shards if path.suffix == ".tar"]
    run(tmp_path, "trainer.max_steps=2", name="twice")
    run(tmp_path, name="twice")
    assert [path.stat().st_mtime_ns for path in shards if path.suffix == ".tar"] == stamps
    again = load_file(tmp_path / "twice" / "adapter" / "diffusion_pytorch_model.safetensors")
    assert first.keys() == again.keys()
    with pytest.raises(ValueError, match="made with annotator.least = 0.0, asked for is 0.5"):
        run(tmp_path, "pictures.least=0.5", name="other")
    assert json.loads((tmp_path / "own" / "train" / "manifest.json").read_text())["samples"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["head.path=appearance"], "expected a head that reads a map .* found a AppearanceHead"),
        (["head.path=nothing"], "no folder 'nothing'"),
        (["pictures.least=9.0"], r"own.*: expected .* samples?, found 0 \(8 indices were skipped"),
    ],
)
def test_what_cannot_be_distilled_is_said(overrides, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(tmp_path, *overrides)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.slow
def test_published_worlds_distil_by_the_same_command(family, tokenizer, tmp_path):
    build(family, tokenizer, dtype=torch.float16).save_pretrained(tmp_path / "model", variant="fp16")
    tiny = DiffusionBackbone.from_pretrained(str(tmp_path / "model"), device="cpu", precision="float16", variant="fp16")
    tiny_head(tiny, variant="rgb").save_pretrained(tmp_path / "head")
    (tmp_path / "prompts.txt").write_text("a person\n\na person on grass\n")
    words = [f"world={family}", "pictures=own", "pictures/prompts=file", f"world.backbone.path={tmp_path / 'model'}"]
    words += [f"pictures.prompts.path={tmp_path / 'prompts.txt'}", f"head.path={tmp_path / 'head'}"]
    words += [f"world.resolution={tiny.resolution[0]}", "pictures.min_contrast=0.0"]
    folder = run(tmp_path, *words)
    adapter = load_adapter(folder)
    assert all(value.isfinite().all() for value in adapter.state_dict().values())
    pipe = with_adapter(tiny.pipeline, adapter)
    control = torch.zeros(1, 3, *tiny.resolution)
    image = generate(pipe, ["a person"], seeds=[0], image=control, num_inference_steps=2)
    assert image.isfinite().all()


def test_a_head_of_another_family_is_refused(backbone, tokenizer):
    other = DiffusionBackbone(build("sd15", tokenizer))
    with pytest.raises(ValueError, match="was made for a"):
        AdapterStudent().attach(other, load_head("pose_8k5"))
    with pytest.raises(ValueError, match="energy_weight: expected 0"):
        AdapterStudent().attach(backbone, None)


# What ComfyUI looks at to know a T2I-Adapter, once "adapter." is taken off and resnets are numbered through.
def comfy_keys(adapter):
    blocks = adapter.adapter.body[0].resnets
    count = len(blocks)
    keys = {}
    for name, value in adapter.state_dict().items():
        parts = name.removeprefix("adapter.").split(".")
        if parts[0] == "body" and parts[2] == "resnets":
            parts = ["body", str(int(parts[1]) * count + int(parts[3])), *parts[4:]]
        elif parts[0] == "body":
            parts = ["body", str(int(parts[1]) * count), *parts[2:]]
        keys[".".join(parts)] = tuple(value.shape)
    return keys


def test_published_layouts_have_the_keys_that_comfyui_reads(tokenizer):
    widths = (8, 16, 32, 32)
    adapter = T2IAdapter(channels=list(widths), num_res_blocks=2, downscale_factor=8, adapter_type="full_adapter")
    keys = comfy_keys(adapter)
    assert keys["conv_in.weight"] == (8, 3 * 64, 3, 3)
    assert {f"body.{i}.block1.weight" for i in range(8)} <= keys.keys()
    assert {f"body.{i}.block2.weight" for i in range(8)} <= keys.keys()
    widened = {name for name in keys if name.endswith("in_conv.weight")}
    assert widened == {"body.2.in_conv.weight", "body.4.in_conv.weight"}
