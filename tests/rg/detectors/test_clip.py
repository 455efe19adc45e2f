from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from rg.detectors.clip import ClipFeatures
from rg.io.images import from_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's image encoder, tiny and with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=12)
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def test_features_are_clip_s_own_of_length_one(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    clip = ClipFeatures.from_pretrained(folder)
    levels = torch.randint(256, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = from_bytes(levels)
    features = clip.embed(images)
    assert features.shape == (40, 12)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(40))
    processor = CLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    pixels = processor(levels, return_tensors="pt", input_data_format="channels_first").pixel_values
    theirs = torch.nn.functional.normalize(clip.model(pixels).image_embeds, dim=-1)
    torch.testing.assert_close(features, theirs, atol=1e-4, rtol=0)


def test_images_of_any_size_are_resized(folder: Path) -> None:
    clip = ClipFeatures.from_pretrained(folder)
    flat = torch.rand(2, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small, large = (clip.embed(flat.expand(-1, -1, *size)) for size in ((16, 16), (64, 48)))
    torch.testing.assert_close(small, large, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["nowhere/at_all", "folder"])
def test_what_is_not_there_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    name = str(tmp_path / name) if name == "folder" else name
    with pytest.raises(FileNotFoundError, match=f"clip={name}: expected .*CLIPVisionModelWithProjection"):
        ClipFeatures.from_pretrained(name)


def test_an_encoder_without_projection_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=12)).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"clip={tmp_path}: expected .*no weights visual_projection.weight"):
        ClipFeatures.from_pretrained(tmp_path)
