"""Rendered negatives: the same structure in another appearance, and look-alikes; and edits by the model."""

from dataclasses import replace

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from data_prep.annotators.sdedit import LateStart, SDEdit
from data_prep.marionette.render import render_scenes
from data_prep.marionette.scene import SHAPE
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.prepare import build
from data_prep.records import SourceGroup
from data_prep.sources.marionette import APPEARANCE, AppearanceTriplets, IdentityTriplets
from rg.backbone.diffusion import DiffusionBackbone
from rg.data.shards import read_shards
from tests import families
from tests.families import MODELS

WORDS = {"shirt", "skin", "hair", "hair_length", "hat", "glasses", "shirt_pattern"}


@pytest.mark.parametrize("kind", ["one", "two", "portrait"])
def test_another_appearance_moves_no_surface(kind):
    source = AppearanceTriplets(kinds={kind: 1.0})
    for index in range(3):
        anchor, positive, negative = source.scenes((0, 0, index))
        stills = render_scenes([anchor, positive, negative], resolution=64, supersampling=2)
        assert torch.equal(stills.depth[0], stills.depth[2]) and torch.equal(stills.parts[0], stills.parts[2])
        assert torch.equal(stills.keypoints[0], stills.keypoints[2])
        pixels = stills.image.float()
        assert (pixels[0] - pixels[2]).abs().mean() > 5
        assert not torch.equal(stills.depth[0], stills.depth[1])
        assert [p.identity for p in anchor.people] == [p.identity for p in positive.people]
        for one, other in zip(anchor.people, negative.people, strict=True):
            assert any(one.identity[name] != other.identity[name] for name in APPEARANCE)
            assert (one.identity["hat"] is None) == (other.identity["hat"] is None)


def test_a_look_alike_differs_in_its_build_and_eyes_alone_and_stands_elsewhere():
    for index in range(5):
        scenes = IdentityTriplets().scenes((0, 0, index))
        anchor, positive, lookalike, stranger = (scene.people[0] for scene in scenes)
        assert anchor.identity == positive.identity and anchor.phase == positive.phase == lookalike.phase
        assert {name: anchor.identity[name] for name in WORDS} == {name: lookalike.identity[name] for name in WORDS}
        assert all(anchor.identity[name] != lookalike.identity[name] for name in SHAPE)
        assert all(anchor.identity[name] != stranger.identity[name] for name in SHAPE)
        assert len({scene.camera for scene in scenes}) == 4
        assert anchor.pose != positive.pose != lookalike.pose
        assert {scene.kind for scene in scenes} == {"portrait"}
    people = [str(IdentityTriplets().scenes((0, split, i))[0].people[0].identity) for split in (0, 3) for i in range(9)]
    assert len(set(people)) == 18


def test_faces_fill_their_images_and_look_at_the_camera():
    seen = render_scenes(
        [s for i in range(8) for s in IdentityTriplets().scenes((0, 0, i))], resolution=64, supersampling=1
    )
    nose, eyes = seen.keypoints[:, 0, 0], seen.keypoints[:, 0, 14:16]
    assert (eyes[..., 2] > 0).all()
    assert ((nose[:, :2] - 31.5).abs() < 14).all()
    heads = (seen.keypoints[:, 0, 0, 1] - seen.keypoints[:, 0, 1, 1]).abs()  # nose to neck
    portraits = render_scenes([draw_scene((1, i), {"portrait": 1.0}) for i in range(8)], resolution=64, supersampling=1)
    assert heads.mean() > 1.2 * (portraits.keypoints[:, 0, 0, 1] - portraits.keypoints[:, 0, 1, 1]).abs().mean()


def test_an_edit_is_asked_for_the_other_appearance():
    (group,) = AppearanceTriplets(kinds={"one": 1.0}).read("val", [3])
    assert group.edit_prompt != group.prompt
    anchor, _, other = AppearanceTriplets(kinds={"one": 1.0}).scenes((0, 1, 3))
    assert (group.prompt, group.edit_prompt) == (anchor.prompt, other.prompt)


def test_groups_of_a_source_depend_on_their_index_alone():
    (alone,), both = AppearanceTriplets().read("test", [4]), AppearanceTriplets().read("test", [2, 4])
    assert torch.equal(alone.images, both[1].images) and torch.equal(alone.negatives, both[1].negatives)
    assert alone.images.shape == (2, 3, 64, 64) and alone.negatives.shape == (1, 3, 64, 64)
    assert not torch.equal(both[0].images, both[1].images)


@pytest.fixture
def editor(tiny_pipeline):
    edit = SDEdit(num_inference_steps=4)
    edit.attach_backbone(DiffusionBackbone(tiny_pipeline()))
    return edit


def groups(count, negatives=None):
    images = torch.randint(256, (count, 3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    return [SourceGroup(str(i), images[i], f"a person {i}", "video", negatives=negatives) for i in range(count)]


def test_an_edit_depends_on_its_image_alone(editor):
    labels, (alone,) = editor.annotate(groups(12)), editor.annotate(groups(12)[11:])
    assert len(labels) == 12 and torch.equal(labels[11].images, alone.images)
    for label, group in zip(labels, groups(12), strict=True):
        assert label.images.shape == (3, 3, 32, 32) and label.images.dtype == torch.uint8
        assert torch.equal(label.images[:2], group.images[[0, 2]]) and len(label.points) == 0
    edited = torch.stack([label.images[2] for label in labels])
    assert edited.flatten(1).float().std(1).min() > 1 and not torch.equal(edited[0], edited[1])


def test_an_edit_follows_the_prompt_meant_for_it(editor):
    (group,) = groups(1)
    (plain,), (asked,) = editor.annotate([group]), editor.annotate([replace(group, edit_prompt="snow")])
    (same,) = editor.annotate([replace(group, prompt="snow")])
    assert torch.equal(asked.images, same.images) and not torch.equal(asked.images[2], plain.images[2])


def test_a_late_start_edits_as_an_image_to_image_pipeline_does(tiny_pipeline):
    backbone, image = DiffusionBackbone(tiny_pipeline()), groups(3)[2].images
    pipe = AutoPipelineForImage2Image.from_pipe(backbone.pipeline)
    arguments = {"strength": 0.5, "guidance_scale": 3.5, "num_inference_steps": 6}
    generators = [[torch.Generator().manual_seed(i) for i in range(3)] for _ in range(2)]
    wanted = pipe(["grass"] * 3, image=image / 255, generator=generators[0], output_type="pt", **arguments).images
    found = LateStart(backbone)(["grass"] * 3, image=image / 255, generator=generators[1], **arguments)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)
    assert backbone.pipeline.scheduler is pipe.scheduler


@pytest.mark.parametrize("model", MODELS)
def test_every_family_edits(model, tokenizer):
    edit = SDEdit(num_inference_steps=4)
    edit.attach_backbone(DiffusionBackbone(families.build(model, tokenizer)))
    labels, (alone,) = edit.annotate(groups(2)), edit.annotate(groups(2)[1:])
    assert labels[1].images.shape == (3, 3, 32, 32) and torch.equal(labels[1].images, alone.images)
    assert labels[0].images[2].float().std() > 1 and not torch.equal(labels[0].images[2], labels[1].images[2])


def test_known_negatives_come_after_the_edit(editor):
    known = torch.full((1, 3, 32, 32), 7, dtype=torch.uint8)
    (label,) = editor.annotate(groups(1, negatives=known))
    assert label.images.shape == (4, 3, 32, 32) and torch.equal(label.images[3:], known)


def test_the_smallest_edit_keeps_more_than_the_largest(tiny_pipeline):
    """With a real model: the embedded one."""
    backbone = DiffusionBackbone.from_pretrained("marionette")
    (group,) = AppearanceTriplets().read("val", [0])
    changes = []
    for strength in (0.2, 0.8):
        edit = SDEdit(strength=strength, num_inference_steps=5)
        edit.attach_backbone(backbone)
        (label,) = edit.annotate([group])
        changes.append((label.images[2].float() - group.images[0].float()).abs().mean())
    assert changes[0] < 0.7 * changes[1]


@pytest.mark.parametrize(("name", "value"), [("strength", 0.0), ("strength", 1.1), ("num_inference_steps", 1)])
def test_an_edit_without_a_step_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"\(0, 1\].*{name}={value}\b"):
        SDEdit(**{name: value})


def test_shards_of_triplets(tmp_path):
    recipe = {
        "source": {"_target_": "data_prep.sources.marionette.IdentityTriplets"},
        "annotator": {"_target_": "data_prep.annotators.sdedit.SDEdit", "num_inference_steps": 2},
        "backbone": {"_target_": "rg.backbone.diffusion.DiffusionBackbone.from_pretrained", "path": "marionette"},
        "shard_size": 2,
    }
    build(root=str(tmp_path), n=2, **recipe)
    found = read_shards(tmp_path / "train")
    assert found.decoded().shape == (2, 5, 3, 64, 64) and found.latent.shape == (2, 5, 8, 16, 16)
    assert found.points.shape == (2, 0, 5, 3)
