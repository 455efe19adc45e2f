"""The tab that makes people in a pose: what rg.sample +experiment=pose_control does."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import gradio as gr
import torch
from torch import Tensor

from rg.app import view
from rg.app.jobs import Report
from rg.app.model import Model
from rg.app.runs import Run
from rg.detectors.detection import Detector
from rg.io.files import parse_json, write_text
from rg.metrics.keypoints import box_side
from rg.points import KEYPOINTS
from rg.report import match
from rg.sample import Sampled, make_images

RULES = {"score": "pose"} | {name: name for name in ("dsg", "freedom", "mpgd", "velocity_norm", "activation")}
NEAR = 0.1  # of the pose's larger side, as PCK@0.1 counts


def words(model: Model, control: str, given: Mapping[str, Any]) -> list[str]:
    """The overrides of rg.sample of what the fields say; raises ValueError for what no setting would refuse."""
    model.check_steps(given["sampling.num_inference_steps"])
    if given["guidance"] not in RULES:
        raise ValueError(f"guidance: expected one of {', '.join(RULES)}, got {given['guidance']}")
    plain = {name: value for name, value in given.items() if name not in ("control", "guidance")}
    settings = {"control": control, "images": 1, "guidance": RULES[given["guidance"]], **plain}
    return ["+experiment=pose_control", *model.words, *(f"{name}={value}" for name, value in settings.items())]


def make(model: Model, given: Mapping[str, Any], report: Report) -> str:
    """A job: the pictures and what is said of them, as HTML; kept in a run folder."""
    pose = given["control"]
    if len(pose.encode()) > view.MAX_TEXT:
        raise ValueError(f"control: expected at most {view.MAX_TEXT:,} bytes, got {len(pose.encode()):,}")
    parse_json(pose, "control", constants=True)
    with model.run("rg.sample") as run:
        file = run.folder / "pose.json"
        write_text(file, pose + "\n")
        cfg = run.compose(words(model, str(file), given))
        so_far: dict[str, Tensor | None] = {"unguided": None, "guided": None}

        def show(what: str, image: Tensor) -> None:
            so_far[what] = image
            report(view.pictures(so_far))

        made = make_images(cfg, model.backbone, model.watch(report, show))
        made.write(run.folder)
    return result(made, model.judges, run)


def result(made: Sampled, judges: Mapping[str, Detector], run: Run) -> str:
    """What is shown at the end."""
    images = {"unguided": made.unguided[0], "guided": made.guided[0]}
    if made.readout is not None:
        images |= {"control": made.control[0] * 2 - 1, "readout": made.readout[0] * 2 - 1}
    return view.pictures(images) + view.command(run.command, run.folder) + distances(made, judges)


def distances(made: Sampled, judges: Mapping[str, Detector]) -> str:
    """A table: how many pixels each visible keypoint is from where it was asked for, by every judge."""
    asked = made.target.control[:1]
    people, visible = asked.shape[1], asked[0, ..., 2] > 0
    if not judges or not visible.any():
        return ""
    near = NEAR * box_side(asked[0, ..., :2], visible)
    found = {}
    for name, judge in judges.items():
        for what in ("unguided", "guided"):
            seen = match(judge.detect(getattr(made, what)[:1], people), asked)
            apart = (seen.points[0] - asked[0, ..., :2]).norm(dim=-1)
            found[f"{what}, {name}"] = torch.where(seen.found[0], apart, torch.inf)
    rows = [("near, of all", [_share(apart <= near[:, None], visible) for apart in found.values()])]
    for person, joint in visible.nonzero().tolist():
        which = f"{person + 1}: " if people > 1 else ""
        cells = [_cell(float(apart[person, joint]), float(near[person])) for apart in found.values()]
        rows.append((which + KEYPOINTS[joint].replace("_", " "), cells))
    return view.table("pixels apart, by the judges", list(found), rows)


def _share(near: Tensor, visible: Tensor) -> tuple[str, str]:
    return f"{int((near & visible).sum())} of {int(visible.sum())}", ""


def _cell(apart: float, near: float) -> tuple[str, str]:
    if apart == float("inf"):
        return "not seen", "far"
    return f"{apart:.1f}", "near" if apart <= near else "far"


def build(model: Model) -> None:
    """Adds the tab's components, inside a gr.Tab."""
    errors, fields = view.Errors(), {}
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            view.pose_editor(model.size, "pose-json", "pose-result")
            fields["control"] = gr.Textbox(label="The pose as JSON", elem_id="pose-json", lines=2, max_lines=3)
            errors.below("control")
        with gr.Column(scale=1, min_width=300):
            model.add_prompt(fields, errors)
            with gr.Row():
                fields["guidance.strength"] = gr.Slider(0, 3, 1, step=0.05, label="Strength", elem_id="pose-strength")
                fields["guidance"] = gr.Dropdown(list(RULES), value="score", label="Rule")
            errors.below("guidance.strength")
            errors.below("guidance")
            with gr.Row():
                fields["guidance.start"] = gr.Slider(0, 1, 0, step=0.05, label="From (share of the steps)")
                fields["guidance.stop"] = gr.Slider(0, 1, 1, step=0.05, label="To")
            errors.below("guidance.start")
            errors.below("guidance.stop")
            model.add_sampling(fields, errors)
            with gr.Row():
                begin = gr.Button("Make a picture", variant="primary", elem_id="pose-make")
                stop = gr.Button("Stop", variant="stop", elem_id="pose-stop")
            errors.below("")
            shown = gr.HTML(view.pictures({"unguided": None, "guided": None}), elem_id="pose-result")
    model.bind(begin, stop, partial(make, model), fields, shown, errors)
