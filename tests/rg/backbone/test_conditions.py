"""The condition of PixArt: T5's embedding, its mask, and in PixArt-alpha the size of the image."""

import pytest
import torch

from rg.backbone.conditions import encode_condition, with_condition
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.features import predict
from tests.families import build


def test_a_mask_hides_what_padding_holds(tokenizer):
    pipe = build("pixart", tokenizer)
    condition = encode_condition(pipe, "grass")
    tokens = int(condition.mask.sum())  # a space, five letters and the end
    assert condition.text.shape == (1, 300, 10) and condition.mask.shape == (1, 300)
    assert tokens == 7 and condition.mask[0, :tokens].all()
    x_t, time = torch.randn(2, 4, 8, 8), torch.tensor([7, 700])
    inputs = condition.inputs(2, (32, 32), x_t)
    plain = predict(pipe.transformer, x_t, time, **inputs).features
    for position, same in ((tokens, True), (tokens - 1, False)):
        text = inputs["encoder_hidden_states"].clone()
        text[:, position] += 1
        features = predict(pipe.transformer, x_t, time, **inputs | {"encoder_hidden_states": text}).features
        assert torch.allclose(features[-1], plain[-1], atol=1e-5) == same


def test_the_same_text_under_another_mask_is_another_condition(tokenizer):
    own = encode_condition(build("pixart", tokenizer), "").inputs(2, (32, 32), torch.zeros(1))
    held = {**own, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    assert with_condition(held, own) is None
    other = own["encoder_attention_mask"].clone()
    other[:, 5] = 1
    changed = with_condition({**held, "encoder_attention_mask": other}, own)
    assert torch.equal(changed["encoder_attention_mask"], own["encoder_attention_mask"])
    assert changed["added_cond_kwargs"] == held["added_cond_kwargs"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_images_size_is_a_condition_of_pixart_alpha(tokenizer, dtype):
    backbone = DiffusionBackbone(build("pixart_alpha", tokenizer, dtype=dtype))
    condition, like = backbone.condition(""), torch.zeros(1, dtype=dtype)
    own = condition.inputs(2, (32, 48), like)
    added = own["added_cond_kwargs"]
    assert added["resolution"].tolist() == [[32, 48]] * 2 and added["resolution"].dtype == dtype
    torch.testing.assert_close(added["aspect_ratio"], torch.full((2, 1), 32 / 48, dtype=dtype))
    other = condition.inputs(2, (48, 32), like)
    assert with_condition(own, own) is None and with_condition(other, own)["added_cond_kwargs"] == added
