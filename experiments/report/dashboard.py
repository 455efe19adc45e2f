"""W&B views of this project: python -m experiments.report.dashboard, or make dashboard.

A workspace for trainings, one for sweeps, and a report with the paper's figures, by the package wandb-workspaces
(`pip install '.[dashboard]'`). With a key (`wandb login`) they are saved to the account, without one their serialised
form is written, and the command says so.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rg.cli import command
from rg.io.files import read_json, write_json

log = logging.getLogger(__name__)


def workspaces(entity: str, project: str) -> dict[str, Any]:
    """The two workspaces by the names of their files."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as views

    loss = panels.LinePlot(title="Training loss", x="Step", y=["train/loss"], smoothing_factor=0.6)
    scores = panels.LinePlot(title="Validation", x="Step", y=["val/*"])
    media = panels.MediaBrowser(title="Readouts", media_keys=["readouts", "mixing_weights"])
    training = [
        views.Section(name="Training", panels=[loss, scores], is_open=True),
        views.Section(name="What is read", panels=[media], is_open=True),
    ]
    settings = ("settings.head.projection_dim", "settings.data.size", "settings.head.learning_rate", "settings.seed")
    columns = [panels.ParallelCoordinatesPlotColumn(metric=f"c::{name}") for name in settings]
    columns.append(panels.ParallelCoordinatesPlotColumn(metric="train/loss"))
    compared = [
        panels.ParallelCoordinatesPlot(title="Settings against loss", columns=columns),
        panels.ParameterImportancePlot(with_respect_to="train/loss"),
        panels.RunComparer(),
    ]
    sweep = [views.Section(name="Sweep", panels=compared, is_open=True), views.Section(name="Curves", panels=[scores])]
    return {
        "workspace_training": views.Workspace(entity=entity, project=project, name="Trainings", sections=training),
        "workspace_sweep": views.Workspace(
            entity=entity,
            project=project,
            name="Sweeps",
            sections=sweep,
            runset_settings=views.RunsetSettings(groupby=[views.Metric("Group")]),
        ),
    }


def report(entity: str, project: str, summary: Mapping[str, Mapping[str, Any]]) -> Any:
    """The report: for each figure of a summary.json its number and command, and the runs of trainings below."""
    import wandb_workspaces.reports.v2 as blocks

    parts: list[Any] = [blocks.TableOfContents()]
    for key, figure in summary.items():
        text = (
            f"{figure['metric']}: {figure['baseline']:.3f} without, {figure['ours']:.3f} with guidance, standard error "
            f"of the paired difference {figure['sem']:.3f}, {figure['n']} images"
        )
        code = blocks.CodeBlock(code=figure["command"], language="markdown")
        parts += [blocks.H2(f"Figure {key.removeprefix('fig')}"), blocks.P(text), code]
    runs = blocks.Runset()  # of the report's own project; with names it would ask the server for their number
    plots = [blocks.LinePlot(title="Training loss", x="Step", y=["train/loss"])]
    parts += [blocks.H2("Trainings"), blocks.PanelGrid(runsets=[runs], panels=plots)]
    title, about = "Readout Guidance, measured", "Every figure of the paper on the embedded model"
    return blocks.Report(entity=entity, project=project, title=title, description=about, blocks=parts)


def key_is_there() -> bool:
    """Whether W&B would find a key: in the environment or in the file that `wandb login` writes."""
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def build(cfg: DictConfig, folder: Path) -> list[Path]:
    """Saves the views or writes their serialised form; returns the files that were written.

    Raises:
        ModuleNotFoundError: the package wandb-workspaces is not installed.
        FileNotFoundError: there is no summary.
    """
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("wandb-workspaces: expected it, found none: pip install '.[dashboard]'") from error
    entity, project = cfg.entity or "entity", cfg.project
    views = workspaces(entity, project) | {"report": report(entity, project, read_json(Path(cfg.summary)))}
    if key_is_there() and cfg.entity:
        for view in views.values():
            view.save()
            log.info("%s", view.url)
        return []
    log.info("no key of W&B, or no entity=: nothing was saved there, what would be is in %s", folder)
    paths = []
    for name, view in views.items():
        paths.append(folder / f"{name}.json")
        write_json(paths[-1], json.loads(view._to_model().model_dump_json(by_alias=True)))
    return paths


@command("experiments/dashboard")
def main(cfg: DictConfig) -> None:
    """Saves the views, or says where their serialised form is."""
    for path in build(cfg, Path("outputs") / cfg.name):
        print(path)


if __name__ == "__main__":
    main()
