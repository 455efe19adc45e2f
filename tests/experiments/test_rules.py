"""The comparison of rules: what is counted, how cells are paired, and a run of it all."""

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments.comparison.cells import Measured, counted, pck_of
from experiments.comparison.table import diversity, pareto, rows, table
from experiments.rules import choices, run
from rg.cli import compose_config
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.io.figures import save_figure


def cell(guided, words=(1.0, 1.0, math.nan), plain=(0.0, 0.0, 0.3), shade=0.0):
    scores = {
        name: {"PCK@0.1": torch.tensor(pck), "words": torch.tensor(right)}
        for name, pck, right in (("unguided", plain, (1.0, 1.0, 1.0)), ("guided", guided, words))
    }
    images = {name: torch.full((3, 3, 4, 4), shade) for name in scores}
    return Measured(scores, images, {}, {"forward": 100.0, "backward": 50.0}, {"unguided": 1.0, "guided": 2.5})


def test_rows_that_pass_through_the_denoiser_are_counted(tiny_pipeline, denoise):
    pipe = tiny_pipeline()
    guidance = ReadoutGuidance([GuidanceTerm(lambda f, _: f[-1].square().flatten(1).mean(1))])
    with counted(pipe.unet) as rows_of:
        denoise(pipe, images=2, steps=3)
        assert rows_of == {"forward": 12, "backward": 0}
        denoise(pipe, guidance, images=2, steps=3)
    assert rows_of == {"forward": 24, "backward": 6}
    assert not pipe.unet.up_blocks[0].resnets[0].conv2._forward_hooks


def test_poses_are_paired_and_seeds_averaged(tmp_path):
    found = {
        ("score", 1.0): [cell((0.8, 0.6, 0.4), shade=0.0), cell((0.6, 0.4, 0.2), shade=0.5)],
        ("dsg", 0.5): [cell((0.9, 0.7, 0.5)), cell((0.9, 0.7, 0.5), words=(0.0, 1.0, math.nan))],
    }
    unguided, usual, dsg = rows(found, ("score", 1.0))
    assert [line.rule for line in (unguided, usual, dsg)] == ["unguided", "score", "dsg"]
    assert usual.scores["PCK@0.1"] == pytest.approx(0.5) and usual.against["PCK@0.1"] is None
    assert usual.gains["PCK@0.1"]["mean"] == pytest.approx(0.4) and usual.diversity == pytest.approx(0.5)
    # Of every pose 0.2 better than the default, whichever the seed: the interval is a point.
    assert [dsg.against["PCK@0.1"][name] for name in ("mean", "low", "high")] == pytest.approx([0.2] * 3, abs=1e-6)
    assert dsg.scores["words"] == pytest.approx(0.75) and dsg.against["words"]["mean"] == pytest.approx(-0.25)
    text = table([unguided, usual, dsg])
    assert "| dsg | 0.5 | 0.700 (+0.200 to +0.200) | 0.750 " in text and "| score | 1 | 0.500 | 1.000 |" in text
    save_figure(pareto([unguided, usual, dsg]), tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").stat().st_size > 1000


def test_one_seed_has_no_diversity():
    assert math.isnan(diversity([torch.zeros(2, 3, 4, 4)]))
    assert diversity([torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]) == 1


@pytest.mark.parametrize("judges", [None, ("one", "other")])
def test_whatever_judges_an_evaluation_has_are_read(judges):
    verdict = {"guided": {"pck": {"target": {"0.1": 0.5, "0.2": None}}}}
    record = verdict if judges is None else {"judges": dict.fromkeys(judges, verdict)}
    found = pck_of([record, record], "guided")
    names = [""] if judges is None else [f" {judge}" for judge in judges]
    assert [*found] == [f"PCK@{alpha}{name}" for name in names for alpha in ("0.1", "0.2")]
    assert found[f"PCK@0.1{names[0]}"].tolist() == [0.5, 0.5] and found[f"PCK@0.2{names[0]}"].isnan().all()


def small(folder: Path, **changes):
    cfg = compose_config("experiments/rules", ["sizes=small"])
    OmegaConf.set_struct(cfg, False)
    return OmegaConf.merge(cfg, {"out": str(folder), **changes})


@pytest.mark.slow
def test_the_default_comes_first_and_each_rule_composes(tmp_path):
    planned = list(choices(small(tmp_path)))
    assert (planned[0].rule, planned[0].strength) == ("score", 1.0)
    assert len({(choice.rule, choice.strength) for choice in planned}) == len(planned) == 19
    folders = [one.run_dir for choice in planned for one in choice.cells]
    assert len({*folders}) == 38 and str(tmp_path / "dsg-0.5/1") in folders
    with pytest.raises(ValueError, match="default: expected one of .*'dsg'.*, got 'none'"):
        list(choices(small(tmp_path, default="none")))
    with pytest.raises(ValueError, match="images: expected at least 2, got 1"):
        list(choices(small(tmp_path, images=1)))


@pytest.mark.slow
def test_a_comparison_of_two_rules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rules = {"score": {"strengths": [1.0]}, "dsg": {"strengths": [1.0]}}
    cfg = small(Path("out"), images=2, seeds=[0], overrides=["sampling.num_inference_steps=2"])
    for name in [*cfg.rules]:
        if name not in rules:
            del cfg.rules[name]
    cfg = OmegaConf.merge(cfg, {"rules": rules})
    text = run(cfg)
    assert text.count("\n| ") == 3 and Path("out/pareto.png").is_file()
    plain, other = (Path(f"out/{name}-1/0/samples/00000-unguided.png").read_bytes() for name in ("score", "dsg"))
    assert plain == other
    assert run(cfg).splitlines()[:4] == text.splitlines()[:4]  # all of it is read
