"""The main job on the embedded world, start to end: python -m experiments.demo (make demo)

Guided images from the shipped head, a head trained on 100 images, and its evaluation; settings are rg.evaluate's.
"""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from rg.cli import command, compose_config
from rg.evaluate import check_settings, evaluate, load_judges
from rg.generation import scheduler_class
from rg.sample import sample
from rg.train import train

# Groups of settings that the sampling and the training share with the evaluation.
SHARED = ("world", "pictures")


def compose_step(name: str, cfg: DictConfig, words: Sequence[str]) -> DictConfig:
    """The configuration of rg.sample or rg.train in the demo.

    Args:
        name: sample or train.
        cfg: of the demo.
        words: overrides of the demo; those of SHARED hold here too.
    """
    shared = [word for word in words if word.lstrip("+~").split("=")[0].split(".")[0] in SHARED]
    step = compose_config(name, [f"+experiment={cfg[name].experiment}", *shared])
    step.run_dir = cfg[name].run_dir
    return step


def labelled_by(builder: DictConfig) -> str:
    """The class of the annotator that will make the labels, see data_prep.prepare.build."""
    labels = builder.get("labels")
    maker = labels if labels is not None and labels.path is not None else builder.annotator
    return maker["_target_"].split(".")[-1]


def demo(cfg: DictConfig, words: Sequence[str]) -> None:
    """Samples, trains and evaluates in the folders of cfg.

    Raises:
        ValueError, FileNotFoundError: settings that the evaluation would refuse in the end are refused at once.
    """
    sampling, training = (compose_step(name, cfg, words) for name in ("sample", "train"))
    check_settings(cfg)
    scheduler_class(cfg.scheduler)
    load_judges(cfg, labelled_by(training.data.builder))
    for name, function, step in (("sample", sample, sampling), ("train", train, training)):
        print(f"\n$ python -m rg.{name} +experiment={cfg[name].experiment} run_dir={step.run_dir}", flush=True)
        function(step, Path(step.run_dir))
    print(f"\n$ python -m rg.evaluate head.path={cfg.head.path} {' '.join(words)}", flush=True)
    evaluate(cfg, Path(cfg.run_dir))


@command("demo")
def main(cfg: DictConfig) -> None:
    """Runs the demo and says where its images are."""
    demo(cfg, [word for word in HydraConfig.get().overrides.task if not word.startswith("resume=")])
    print(f"\nImages: {cfg.sample.run_dir}/grid.png and {cfg.run_dir}/grid.png\nTable:    {cfg.run_dir}/table.md")


if __name__ == "__main__":
    main()
