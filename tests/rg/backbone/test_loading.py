"""Pipelines from folders: whole ones of every family, broken ones, and a hub that does not answer."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.loading import check_folder, find_pipeline, load_pipeline
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from tests.checkpoints import save_checkpoint
from tests.families import FAMILIES, FLOW_MODELS, MODELS, build, denoise


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A saved tiny pipeline of each model, read only."""
    root = tmp_path_factory.mktemp("pipelines")
    for model in MODELS:
        build(model, tokenizer).save_pretrained(root / model)
    return root


@pytest.fixture
def folder(tokenizer, tmp_path):
    """A saved tiny pipeline to damage; its U-Net lies in several files, as large ones do."""
    pipe = build("sd15", tokenizer)
    pipe.save_pretrained(tmp_path / "sd15")
    (tmp_path / "sd15/unet/diffusion_pytorch_model.safetensors").unlink()
    pipe.unet.save_pretrained(tmp_path / "sd15/unet", max_shard_size="60KB")
    return tmp_path / "sd15"


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("model", MODELS)
def test_a_backbone_of_every_model_loads_and_runs(folders, tokenizer, model, precision):
    backbone = DiffusionBackbone.from_pretrained(str(folders / model), precision=precision)
    assert isinstance(backbone.pipeline.scheduler, DDIMScheduler)
    assert backbone.pipeline.scheduler.config.prediction_type == ("v_prediction" if model == "sd21" else "epsilon")
    assert backbone.denoiser.dtype == getattr(torch, precision) and backbone.vae.dtype == torch.float32
    taps = [24, 24, 24] if model == "pixart" else [16, 16, 8, 8]
    assert (backbone.resolution, backbone.latent_size, backbone.tap_channels) == ((32, 32), (8, 8), taps)
    assert backbone.condition_dim == {"sd15": 8, "sd21": 12, "sdxl": 16, "pixart": 10}[model]
    for name in ("text_encoder", "text_encoder_2"):
        module = getattr(backbone.pipeline, name, None)
        assert module is None or not (module.training or any(p.requires_grad for p in module.parameters()))
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = backbone.encode(images)
    assert mean.shape == std.shape == (2, 4, 8, 12) and backbone.decode(mean).shape == images.shape
    timesteps = torch.tensor([20, 800])
    noisy = backbone.add_noise(mean, torch.randn_like(mean), timesteps)
    first, second = (backbone.predict(noisy, timesteps, prompt) for prompt in ("", "grass at dusk"))
    assert first.output.shape == noisy.shape and not torch.equal(first.output, second.output)
    guidance = ReadoutGuidance([GuidanceTerm(lambda f, _: f[-1].square().flatten(1).mean(1))], readout_scale=0.0)
    plain = denoise(backbone.pipeline, model, steps=2)
    torch.testing.assert_close(denoise(backbone.pipeline, model, guidance, steps=2), plain, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*MODELS, *FLOW_MODELS)])
def test_pipelines_on_top_of_a_model_save_and_load(tokenizer, tmp_path, family):
    pipe = build(family, tokenizer)
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    torch.testing.assert_close(denoise(loaded, family, steps=2), denoise(pipe, family, steps=2), rtol=1e-4, atol=1e-4)


def test_pixart_under_the_transformers_former_name(folders, tmp_path):
    # As the repositories of the hub have it.
    shutil.copytree(folders / "pixart", tmp_path / "pixart")
    for name in ("model_index.json", "transformer/config.json"):
        path = tmp_path / "pixart" / name
        path.write_text(path.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    backbone, plain = (DiffusionBackbone.from_pretrained(str(root / "pixart")) for root in (tmp_path, folders))
    x_t, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([7])
    assert torch.equal(backbone.predict(x_t, timesteps).output, plain.predict(x_t, timesteps).output)


def test_half_precision_files_are_a_variant(tokenizer, tmp_path):
    build("sd15", tokenizer, dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert load_pipeline(str(tmp_path), variant="fp16").unet.dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=r"\w+/\*\.safetensors.*\[.*fp16\.safetensors"):
        load_pipeline(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"\w+/\*\.bf16\.safetensors"):
        load_pipeline(str(tmp_path), variant="bf16")
    with pytest.raises(ValueError, match=r"precision: .*'float16'.*'half'"):
        load_pipeline(str(tmp_path), precision="half")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "no component": (lambda f: [p.unlink() for p in (f / "vae").iterdir()] and (f / "vae").rmdir(), FileNotFoundError,
                     r"vae .*AutoencoderKL.* none"),
    "no configuration": (lambda f: (f / "unet/config.json").unlink(), FileNotFoundError,
                         r"unet/config\.json.*\['diffusion_pytorch_model"),
    "no scheduler": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), FileNotFoundError,
                     r"scheduler/scheduler_config\.json.*\[\]"),
    "no tokenizer": (lambda f: (f / "tokenizer/tokenizer_config.json").unlink(), FileNotFoundError,
                     r"tokenizer/tokenizer_config\.json"),
    "no weights": (lambda f: (f / "text_encoder/model.safetensors").unlink(), FileNotFoundError,
                   r"text_encoder/\*\.safetensors.*\['config\.json'\]"),
    "pickled weights": (lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/pytorch_model.bin"),
                        FileNotFoundError, r"text_encoder/\*\.safetensors.*pytorch_model\.bin"),
    "one file short": (lambda f: min((f / "unet").glob("*-of-*.safetensors")).unlink(), FileNotFoundError,
                       r" \d files .*unet.*\['diffusion_pytorch_model-00001-of-"),
    "cut short": (lambda f: cut(f / "vae/diffusion_pytorch_model.safetensors"), ValueError,
                  r"vae/diffusion_pytorch_model\.safetensors .* \d+ bytes.* \d+"),
    "empty": (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_bytes(b""), ValueError,
              r"vae/diffusion_pytorch_model\.safetensors .* 0 bytes"),
    "a page": (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").write_text("<html>not</html>"), ValueError,
               r"vae/diffusion_pytorch_model\.safetensors .*no safetensors"),
    "damaged index": (lambda f: (f / "model_index.json").write_text("{"), ValueError, r"model_index\.json: .*JSON"),
    "an index of numbers": (lambda f: (f / "model_index.json").write_text('{"unet": [1, 2]}'), ValueError,
                            r"model_index\.json: unet: .*string, found 1"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text('{"version": "1.0"'), ValueError,
                            r"tokenizer/tokenizer\.json: .*JSON"),
    "another's tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text('{"version": "1.0", "padding": 3}'),
                            ValueError, "cannot be loaded"),
    "other sizes": (lambda f: (f / "unet/config.json").write_text(
        (f / "unet/config.json").read_text().replace('"cross_attention_dim": 8', '"cross_attention_dim": 9')),
        ValueError, r"size"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_one_clear_error(folder, damage):
    assert check_folder(folder)
    work, kind, words = DAMAGE[damage]
    work(folder)
    with pytest.raises(kind, match=words) as caught:
        load_pipeline(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and (caught.value.__context__ is None or caught.value.__suppress_context__)


def test_unused_parts_need_not_be_there(folder):
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_pipeline(str(folder)).safety_checker is None


def test_a_pipeline_without_the_taps_is_named(tmp_path, tokenizer):
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, sample_size=8, num_layers=1, norm_num_groups=4
    )
    DiTPipeline(transformer, build("sd15", tokenizer).vae, DDIMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"U-Net.* PixArt.* DiTPipeline"):
        DiffusionBackbone.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch, tmp_path, offline):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="backbone nobody/nothing: ") as e:
        load_pipeline("nobody/nothing")
    assert "\n" not in str(e.value) and "hf download nobody/nothing" in str(e.value) and e.value.__suppress_context__


def test_a_repository_in_the_hubs_cache_loads_offline_and_a_part_of_it_is_named(monkeypatch, tmp_path, folders):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(folders / "sdxl", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    assert find_pipeline("somebody/tiny") == snapshot
    assert DiffusionBackbone.from_pretrained("somebody/tiny").condition_dim == 16
    (snapshot / "text_encoder_2/model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_encoder_2/\*\.safetensors"):
        load_pipeline("somebody/tiny")


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """Writes a tiny pipeline as a single file, its configuration beside it: checkpoint("sd15") -> (pipeline, path)."""

    def write(model):
        pipe = build(model, tokenizer)
        if model == "sdxl":  # whose text encoders differ in width: by that the file's are told apart
            torch.manual_seed(0)
            for name, kind, width in (
                ("text_encoder", CLIPTextModel, 4),
                ("text_encoder_2", CLIPTextModelWithProjection, 12),
            ):
                config = getattr(pipe, name).config
                setattr(pipe, name, kind(type(config)(**{**config.to_dict(), "hidden_size": width})).eval())
        pipe.save_pretrained(tmp_path)
        for file in tmp_path.rglob("*.safetensors"):
            file.unlink()
        save_checkpoint(pipe, tmp_path / "model.safetensors")
        return pipe, tmp_path / "model.safetensors"

    return write


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_a_single_file_loads_offline(checkpoint, model):
    pipe, path = checkpoint(model)
    backbone = DiffusionBackbone.from_pretrained(str(path), device="cpu")
    assert type(backbone.pipeline) is type(pipe)
    assert backbone.pipeline.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    torch.testing.assert_close(denoise(backbone.pipeline, model, steps=2), denoise(pipe, model, steps=2))
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    for one, other in zip(backbone.encode(images), DiffusionBackbone(pipe).encode(images), strict=True):
        torch.testing.assert_close(one, other)
    assert load_pipeline(str(path), precision="bfloat16").unet.dtype == torch.bfloat16


def test_a_single_file_that_is_none_is_one_clear_error(checkpoint, tmp_path):
    _, path = checkpoint("sd15")
    whole = path.read_bytes()
    tensors = load(whole)  # not mapped: the file is written anew
    denoiser = {name: value for name, value in tensors.items() if name.startswith("model.diffusion_model.")}
    lacking = {name: value for name, value in tensors.items() if ".middle_block.0." not in name}
    narrow = {name: value[..., :4] if name.endswith("attn2.to_k.weight") else value for name, value in tensors.items()}

    def refused(words, kind=ValueError, path=path):
        with pytest.raises(kind, match=words) as caught:
            load_pipeline(str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    for content, words in (
        (whole[:-10], rf"half downloaded: expected {len(whole)} bytes, found {len(whole) - 10}"),
        (b"<html>not found</html>", "is no safetensors file"),
        (b"", "is no safetensors file"),
    ):
        path.write_bytes(content)
        refused(words)
    for held, words in (
        (denoiser, "expected a whole model, found no autoencoder and no text encoder"),
        ({"lora_unet_down.weight": torch.zeros(2)}, "expected a whole model, found no denoiser"),
        (lacking, "expected all weights of the model, some are missing"),
        (narrow, "cannot be loaded: .*shape"),
    ):
        save_file({name: value.contiguous() for name, value in held.items()}, path)
        refused(words)
    refused("expected a file of safetensors", FileNotFoundError, tmp_path / "absent.safetensors")
    (tmp_path / "model.ckpt").write_bytes(whole)
    refused(r"expected .safetensors, got '.ckpt'", path=tmp_path / "model.ckpt")
    path.write_bytes(whole)
    (tmp_path / "model_index.json").unlink()
    refused("expected its configuration beside it", FileNotFoundError)


@pytest.mark.parametrize("model", FLOW_MODELS)
def test_a_backbone_of_flow_matching_loads_and_runs(tokenizer, tmp_path, model):
    pipe = build(model, tokenizer)
    pipe.save_pretrained(tmp_path)
    backbone = DiffusionBackbone.from_pretrained(str(tmp_path), device="cpu")
    assert type(backbone.pipeline.scheduler) is type(pipe.scheduler) and backbone.flow
    side = 512 if model == "flux" else 32  # its transformer knows no size: the pipeline's latents are 128x128
    assert (backbone.resolution, backbone.latent_channels) == ((side, side), 4)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    mean, std = backbone.encode(images)
    assert mean.shape == std.shape == (2, 4, 8, 12)
    # What the pipeline itself makes of these latents.
    latents = backbone.pipeline.vae.encode(images)
    latents = latents.latent_dist.mean if hasattr(latents, "latent_dist") else latents.latent
    config = backbone.vae.config
    torch.testing.assert_close(mean, (latents - (config.get("shift_factor") or 0)) * config.scaling_factor)
    torch.testing.assert_close(backbone.decode(mean), backbone.vae.decode(latents).sample.clamp(-1, 1))
    timesteps = torch.tensor([20, 800])
    first, second = (backbone.predict(mean, timesteps, prompt) for prompt in ("", "grass at dusk"))
    assert first.output.shape == mean.shape and not torch.equal(first.output, second.output)
    assert [feature.shape[1] for feature in first.features] == backbone.tap_channels
    assert backbone.embed_time(timesteps).shape == (2, backbone.time_embed_dim)
