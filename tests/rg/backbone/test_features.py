import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from rg.backbone.denoiser import taps
from rg.backbone.features import predict, select_rows
from rg.guidance.attach import hooked


@pytest.fixture
def unet(tiny_pipeline):
    return tiny_pipeline().unet


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([7, 700]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }


def snapshot(module):
    """Every attribute and hook of every sub-module, and which parameters are trainable."""
    attributes = {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in vars(part).items()}
        for name, part in module.named_modules()
    }
    return attributes, {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def test_prediction_is_the_models_output_and_what_its_taps_gave(unet, inputs):
    given = {}
    for name, tap in taps(unet).items():
        tap.register_forward_hook(lambda _m, _i, output, name=name: given.update({name: output}))
    plain = unet(**inputs, return_dict=False)[0]
    expected = list(given.values())
    before = snapshot(unet)
    prediction = predict(unet, **inputs)
    assert snapshot(unet) == before
    assert torch.equal(prediction.output, plain)
    assert [tuple(f.shape) for f in prediction.features] == [(2, 16, 4, 4), (2, 16, 4, 4), (2, 8, 8, 8), (2, 8, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(prediction.features, expected, strict=True))


def test_a_failed_prediction_leaves_no_tap_behind(unet, inputs):
    before = snapshot(unet)
    with pytest.raises(RuntimeError):
        predict(unet, **inputs | {"encoder_hidden_states": torch.zeros(2, 5, 9)})
    assert snapshot(unet) == before


def test_recomputation_in_the_backward_pass_adds_no_features_and_keeps_the_gradient(unet, inputs):
    gradients = []
    for checkpointing in (False, True):
        sample = inputs["sample"].clone().requires_grad_()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        features = predict(unet, **inputs | {"sample": sample}).features
        gradients.append(torch.autograd.grad(sum(f.square().sum() for f in features), sample)[0])
        assert len(features) == 4
    torch.testing.assert_close(*gradients)


def test_select_rows_slices_the_batch_axis_wherever_it_is_nested():
    batch, other = torch.arange(8.0).view(4, 2), torch.arange(3.0)
    value = {"a": batch, "b": (batch, [batch, "text"]), "scale": torch.tensor(2.0), "other": other, "none": None}
    taken = select_rows(value, slice(1, 3), 4)
    rows = batch[1:3]
    assert torch.equal(taken["a"], rows) and torch.equal(taken["b"][0], rows) and torch.equal(taken["b"][1][0], rows)
    assert taken["b"][1][1] == "text" and taken["none"] is None
    assert taken["scale"] is value["scale"] and taken["other"] is other


def test_select_rows_clones_what_a_model_edits_in_place():
    residuals = [torch.ones(2, 3)]
    taken = select_rows(residuals, slice(0, 2), 2)
    taken.pop(0).add_(1)
    assert len(residuals) == 1 and torch.equal(residuals[0], torch.ones(2, 3))


def test_hook_answers_for_the_denoiser_in_both_return_forms(unet, inputs):
    def doubled(forward, sample, timestep, **others):
        assert timestep.ndim == 0 and timestep == 3
        return 2 * forward(sample, timestep, return_dict=False, **others)[0]

    plain = unet(**inputs | {"timestep": 3}).sample
    with hooked(unet, doubled):
        assert torch.equal(unet(**inputs | {"timestep": 3}).sample, 2 * plain)
        assert torch.equal(unet(**inputs | {"timestep": 3}, return_dict=False)[0], 2 * plain)
        with pytest.raises(TypeError, match="keyword"):
            unet(inputs["sample"], 3, inputs["encoder_hidden_states"])
    assert torch.equal(unet(**inputs | {"timestep": 3}).sample, plain)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("checkpointed_before", [False, True])
@pytest.mark.parametrize("broken", [False, True])
def test_hook_leaves_no_trace(unet, checkpointing, checkpointed_before, broken):
    for number, parameter in enumerate(unet.parameters()):
        parameter.requires_grad_(number % 3 == 0)
    if checkpointed_before:
        unet.up_blocks[0].gradient_checkpointing = True
    before = snapshot(unet)
    try:
        with hooked(unet, lambda *_: None, checkpointing=checkpointing):
            assert not any(parameter.requires_grad for parameter in unet.parameters())
            assert unet.down_blocks[0].gradient_checkpointing == checkpointing
            assert unet.up_blocks[0].gradient_checkpointing == (checkpointing or checkpointed_before)
            if broken:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert broken
    assert snapshot(unet) == before


def test_hook_keeps_the_users_own_hook(unet, inputs):
    class Negate(ModelHook):
        def post_forward(self, module, output):
            return (-output[0],)

    plain = unet(**inputs, return_dict=False)[0]
    registry = HookRegistry.check_if_exists_or_initialize(unet)
    registry.register_hook(Negate(), "negate")
    before = unet.forward
    with hooked(unet, lambda forward, *given, **others: 2 * forward(*given, return_dict=False, **others)[0]):
        assert torch.equal(unet(**inputs, return_dict=False)[0], -2 * plain)
    assert unet.forward is before and unet._diffusers_hook is registry and list(registry.hooks) == ["negate"]


def test_second_hook_is_refused_and_the_first_one_goes_on(unet, inputs):
    with hooked(unet, lambda _f, sample, _t, **_: sample):
        with pytest.raises(RuntimeError, match="already"), hooked(unet, lambda *_: None):
            pass
        assert torch.equal(unet(**inputs).sample, inputs["sample"])
    with hooked(unet, lambda _f, sample, _t, **_: -sample):
        assert torch.equal(unet(**inputs).sample, -inputs["sample"])
