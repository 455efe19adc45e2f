"""What docs/pipelines.md promises of pipelines that were saved to a folder and are loaded as users load them."""

import pytest
import torch
from diffusers import DiffusionPipeline

from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.heads.protocol import FunctionHead
from tests.families import FLOW_MODELS, MODELS, build, denoise, mostly_slow
from tests.rg.guidance.test_families import brightness, traces


@pytest.mark.parametrize("family", mostly_slow([*MODELS, *FLOW_MODELS], ("sd3",)))
def test_a_loaded_pipeline_is_guided_as_promised(tokenizer, tmp_path, family):
    build(family, tokenizer).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    plain, before = denoise(pipe, family, steps=6), traces(pipe)
    term = GuidanceTerm(FunctionHead(brightness, prompt=""))
    # As far as in test_families: weights that are random need not give way to a weaker one.
    still, guided = (ReadoutGuidance([term], strength=strength, normalize="rms") for strength in (0, 1))
    torch.testing.assert_close(denoise(pipe, family, still, steps=6), plain, rtol=1e-5, atol=1e-5)
    moved = denoise(pipe, family, guided, steps=6)
    assert (guided.trace[-1].energy < still.trace[-1].energy).all()
    # One image alone is what it is among others.
    torch.testing.assert_close(denoise(pipe, family, guided, images=1, steps=6), moved[:1], rtol=1e-3, atol=1e-3)
    assert traces(pipe) == before
    assert torch.equal(denoise(pipe, family, steps=6), plain)
