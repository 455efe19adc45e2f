import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert
from rg.heads.spatial import SpatialHead
from rg.models import MODELS, locate
from tests.families import build


@pytest.fixture
def backbone(tiny_pipeline):
    return DiffusionBackbone(tiny_pipeline())


def test_sizes_follow_from_the_model(backbone):
    assert (backbone.resolution, backbone.latent_size, backbone.latent_channels) == ((32, 32), (8, 8), 4)
    assert (backbone.num_timesteps, backbone.time_embed_dim) == (1000, 32)
    assert backbone.device == torch.device("cpu")


@pytest.mark.parametrize(("side", "sliced"), [(64, False), (128, True)])
def test_images_of_512_pixels_pass_the_autoencoder_one_by_one(tiny_pipeline, side, sliced):
    pipe = tiny_pipeline()
    pipe.unet.register_to_config(sample_size=side)
    backbone, seen = DiffusionBackbone(pipe), []
    assert backbone.resolution == (4 * side, 4 * side)
    for module in (pipe.vae.encoder, pipe.vae.decoder):
        module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    mean, _ = backbone.encode(torch.zeros(3, 3, 32, 32))
    assert len(backbone.decode(mean)) == 3
    assert seen == ([1] * 6 if sliced else [3, 3])


def test_encode_and_decode(backbone):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = backbone.encode(images)
    assert mean.shape == std.shape == (2, 4, 8, 8) and (std > 0).all()
    decoded = backbone.decode(mean)
    assert decoded.shape == images.shape
    backbone.vae.decoder.conv_out.weight *= 100
    bright = backbone.decode(mean)
    assert bright.min() == -1 and bright.max() == 1


def test_latents_are_scaled(backbone):
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = backbone.encode(images)
    decoded = backbone.decode(mean)
    backbone.vae.register_to_config(scaling_factor=2 * backbone.vae.config.scaling_factor)
    twice, twice_std = backbone.encode(images)
    torch.testing.assert_close(twice, 2 * mean)
    torch.testing.assert_close(twice_std, 2 * std)
    torch.testing.assert_close(backbone.decode(twice), decoded)


def test_add_noise_is_the_schedulers(backbone):
    latents, noise, timesteps = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 1, 500, 999])
    scheduler = DDPMScheduler.from_config(backbone.pipeline.scheduler.config)
    expected = scheduler.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(backbone.add_noise(latents, noise, timesteps), expected)
    assert backbone.add_noise(latents.double(), noise.double(), timesteps).dtype == torch.float64


def test_predict_is_deterministic_and_row_by_row(backbone):
    x_t, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999])
    first, second = backbone.predict(x_t, timesteps), backbone.predict(x_t, timesteps)
    assert torch.equal(first.output, second.output) and first.output.shape == x_t.shape
    alone = backbone.predict(x_t[1:2], timesteps[1:2])
    torch.testing.assert_close(alone.output, first.output[1:2])
    for one, other, many in zip(alone.features, second.features, first.features, strict=True):
        assert torch.equal(other, many)
        torch.testing.assert_close(one, many[1:2])


def test_features_are_the_taps_from_coarse_to_fine(backbone):
    features = backbone.predict(torch.randn(2, 4, 8, 8), torch.tensor([3, 4])).features
    assert backbone.tap_channels == [16, 16, 8, 8]  # two decoder blocks of layers_per_block + 1
    assert [tuple(f.shape) for f in features] == [(2, 16, 4, 4), (2, 16, 4, 4), (2, 8, 8, 8), (2, 8, 8, 8)]
    embedding = backbone.embed_time(torch.tensor([3, 4]))
    assert embedding.shape == (2, 32) and not torch.equal(embedding[0], embedding[1])


def test_prompts_matter_and_are_encoded_once(backbone):
    x_t, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    plain = backbone.predict(x_t, timesteps).output
    assert not torch.equal(plain, backbone.predict(x_t, timesteps, "a person in a red shirt").output)
    assert backbone.condition("") is backbone.condition("")
    assert not backbone.condition("").text.requires_grad
    assert not backbone.to("cpu").conditions


def test_the_model_is_frozen_in_evaluation_mode(tiny_pipeline):
    pipeline = tiny_pipeline()
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.train()
    backbone = DiffusionBackbone(pipeline)
    for module in (backbone.denoiser, backbone.vae, backbone.pipeline.text_encoder):
        assert not any(inner.training for inner in module.modules())
        assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_head_neither_holds_nor_moves_the_backbone(backbone):
    head = SpatialHead(
        tap_channels=backbone.tap_channels, time_embed_dim=backbone.time_embed_dim, projection_dim=16, norm_groups=2
    )
    own = {id(p) for p in head.parameters()}
    head.attach_backbone(backbone).train()
    assert {id(p) for p in head.parameters()} == own
    assert not own & {id(p) for p in backbone.denoiser.parameters()}
    assert not backbone.denoiser.training
    head.double()
    assert next(backbone.denoiser.parameters()).dtype == torch.float32


def test_autoencoder_id_names_weights_and_scale(tiny_pipeline):
    backbone = DiffusionBackbone(tiny_pipeline())
    name = backbone.autoencoder_id
    assert len(name) == 16 and int(name, 16) >= 0
    assert DiffusionBackbone(tiny_pipeline()).autoencoder_id == name
    with torch.no_grad():
        backbone.denoiser.conv_out.bias += 1
    assert backbone.autoencoder_id == name
    with torch.no_grad():
        backbone.vae.decoder.conv_out.bias[0] += 1e-3
    assert backbone.autoencoder_id != name
    other = DiffusionBackbone(tiny_pipeline())
    other.vae.register_to_config(scaling_factor=0.5)
    assert other.autoencoder_id != name


def test_a_saved_pipeline_loads(backbone, tmp_path):
    backbone.pipeline.save_pretrained(tmp_path / "tiny")
    loaded = DiffusionBackbone.from_pretrained(str(tmp_path / "tiny"))
    assert loaded.autoencoder_id == backbone.autoencoder_id
    x_t, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([7])
    torch.testing.assert_close(loaded.predict(x_t, timesteps).output, backbone.predict(x_t, timesteps).output)


def test_a_schedule_of_another_kind_becomes_one_that_ddim_can_follow_and_invert(tokenizer, tmp_path):
    pipe = build("pixart", tokenizer)
    pipe.scheduler = DPMSolverMultistepScheduler()  # as PixArt's: linear betas, spaced from end to end, no clipping
    pipe.save_pretrained(tmp_path)
    backbone = DiffusionBackbone.from_pretrained(str(tmp_path), device="cpu")
    config = backbone.pipeline.scheduler.config
    assert (config.clip_sample, config.timestep_spacing, config.beta_end) == (False, "trailing", 0.02)
    torch.testing.assert_close(backbone.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert invert(backbone, torch.randn(1, 4, 8, 8), num_inference_steps=3).shape == (1, 4, 8, 8)


def test_locate_prefers_a_path_then_a_shipped_model(tmp_path, monkeypatch):
    assert locate("marionette") == MODELS / "marionette"
    assert locate(tmp_path) == tmp_path
    (tmp_path / "marionette").mkdir()
    monkeypatch.chdir(tmp_path)
    assert locate("marionette").resolve() == tmp_path / "marionette"


def test_what_cannot_be_found_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'nowhere'.*\[.*'marionette'.*\]"):
        DiffusionBackbone.from_pretrained("nowhere")
    with pytest.raises(FileNotFoundError, match=r"'nowhere'.*\["):
        locate("nowhere", "heads")
    with pytest.raises(FileNotFoundError, match=rf"backbone {tmp_path}: .*model_index\.json"):
        DiffusionBackbone.from_pretrained(str(tmp_path))
