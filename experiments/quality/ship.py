"""Puts a trained head among the shipped ones, with a card from the run's own record.

python -m experiments.quality.ship run=outputs/pose_8k5/latest name=pose_8k5
"""

import csv
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig

from rg.cli import command
from rg.heads import load_head
from rg.heads.relative import RelativeHead
from rg.io.files import read_text, write_text
from rg.io.records import validate
from rg.models import MODELS

T = TypeVar("T")
MAX_LOG = 2**28  # bytes
SCORE = r"val/.+_t\d+"  # the column of a score at a noise level


def read_yaml(path: Path, schema: type[T]) -> T:
    """What Hydra stored of a run, as the schema says; raises ValueError for a file that is missing or damaged."""
    try:
        content = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from error
    return validate(schema, content, str(path))


def final_scores(run_dir: Path) -> dict[str, float]:
    """The last validation of a run, from its CSV log.

    Raises:
        FileNotFoundError: the run was never validated.
        ValueError: the log is damaged.
    """
    scores: dict[str, float] = {}
    for path in sorted(run_dir.glob("csv/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime):
        try:
            for row in csv.DictReader(read_text(path, MAX_LOG).splitlines()):
                scores |= {key: float(value) for key, value in row.items() if re.fullmatch(SCORE, key or "") and value}
        except (ValueError, TypeError, csv.Error) as error:
            raise ValueError(f"{path}: expected the scores of validations, found {error}") from error
    if not scores:
        raise FileNotFoundError(f"{run_dir}: expected csv/version_*/metrics.csv with a validation, found none")
    return scores


def ship(run_dir: Path, name: str, models: Path = MODELS) -> Path:
    """Writes head and card into <models>/heads/<name>, in half precision; returns that folder."""
    scores = final_scores(run_dir)
    words = read_yaml(run_dir / ".hydra" / "overrides.yaml", list[str])
    overrides = [word for word in words if not word.startswith("resume=")]
    config = read_yaml(run_dir / ".hydra" / "config.yaml", dict[str, Any])
    head = load_head(run_dir / "head")
    folder = models / "heads" / name
    head.save_pretrained(folder, half=True)
    levels = head.hparams.val_timesteps
    names = sorted({key.split("/")[1].rsplit("_t", 1)[0] for key in scores})
    samples = "groups of images" if isinstance(head, RelativeHead) else "images"
    data, steps = config["data"], config["trainer"]["max_steps"]
    count = sum(p.numel() for p in head.parameters())
    lines = [
        f"# {name}",
        "",
        f"{type(head).__name__} for `world={config['world']['name']}`, {count:,} parameters, half precision. Made by",
        "",
        f"    python -m rg.train {' '.join(overrides)}",
        "",
        f"with seed {config['seed']}: {data['size']:,} training {samples}, {steps:,} steps of {data['batch_size']}.",
        f"On {data['val_size']} held-out {samples}, read by the head in full precision:",
        "",
        "| " + " | ".join(["noise level t", *(str(level) for level in levels)]) + " |",
        "|---" * (len(levels) + 1) + "|",
        *("| " + " | ".join([n, *(f"{scores[f'val/{n}_t{t}']:.3f}" for t in levels)]) + " |" for n in names),
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))
    return folder


@command("experiments/ship")
def main(cfg: DictConfig) -> None:
    """Ships the head of the run folder given, under the name given."""
    print(ship(Path(cfg.run), cfg.name, Path(cfg.models or MODELS)))


if __name__ == "__main__":
    main()
