import pytest
import torch

from experiments.benchmark.architectures import build_backbone, count_parameters, make_autoencoder, make_unet, randomise
from rg.backbone.denoiser import tap_channels, time_embed_dim


@pytest.mark.parametrize(
    ("model", "parameters", "channels"),
    [
        # As the published files hold them; the channels are the paper's.
        ("sd15", 859_520_964, [1280] * 6 + [640] * 3 + [320] * 3),
        ("sd21", 865_910_724, [1280] * 6 + [640] * 3 + [320] * 3),
        ("sdxl", 2_567_463_684, [1280] * 3 + [640] * 3 + [320] * 3),
    ],
)
def test_published_unets(model, parameters, channels):
    with torch.device("meta"):
        unet, vae = make_unet(model, latent_side=8), make_autoencoder(model)
    assert count_parameters(unet) == parameters and unet.config.sample_size == 8
    assert tap_channels(unet) == channels and time_embed_dim(unet) == 1280
    assert count_parameters(vae) == 83_653_863


def test_random_weights_keep_the_size_of_what_passes_through():
    layer = torch.nn.Sequential(torch.nn.Linear(3000, 2000), torch.nn.LayerNorm(2000))
    randomise(layer, seed=0)
    assert layer[0](torch.randn(64, 3000)).std().item() == pytest.approx(1, abs=0.05)
    assert not torch.equal(layer[0].weight[0], layer[0].weight[350]) and not layer[0].bias.any()
    assert (layer[1].weight == 1).all()
    again = torch.nn.Linear(3000, 2000)
    randomise(again, seed=0)
    assert torch.equal(again.weight, layer[0].weight)


def test_a_shipped_model_has_its_own_size():
    with pytest.raises(ValueError, match="latent_side: .*16 .*marionette.* 8"):
        build_backbone("marionette", latent_side=8, device="cpu")
