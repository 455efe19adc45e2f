"""The tab that moves what is in a picture: what rg.edit +experiment=drag does."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from rg.app import view
from rg.app.jobs import Report
from rg.app.model import Model
from rg.edit import Edit
from rg.generation import fit_image, generate, image_seeds, set_scheduler, watched
from rg.io.files import parse_json
from rg.io.images import from_bytes, open_image, pixels, save_image

MAX_ARROWS = 32
KEPT = 8  # inversions


class Inversions:
    """The noise of the newest references, each inverted once."""

    def __init__(self) -> None:
        self._noise: OrderedDict[str, Tensor] = OrderedDict()

    @staticmethod
    def key(reference: Path, prompt: str, steps: int) -> str:
        """What the noise of a reference depends on."""
        return f"{hashlib.sha256(reference.read_bytes()).hexdigest()} {steps} {prompt}"

    def find(self, key: str) -> Tensor | None:
        return self._noise.get(key)

    def keep(self, key: str, noise: Tensor) -> None:
        self._noise[key] = noise
        while len(self._noise) > KEPT:
            self._noise.popitem(last=False)


def upload(model: Model, given: Mapping[str, Any]) -> Tensor:
    """The picture (3, H, W) in [-1, 1] of an uploaded file, upright, its centre at the model's size.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not given["reference"]:
        raise ValueError("reference: expected a picture, got none: upload one, or make one")
    path = Path(given["reference"])
    try:
        image = fit_image(open_image(path), model.size)
    except ValueError as error:
        raise ValueError(f"reference: {str(error).replace(str(path), path.name)}") from error
    finally:
        path.unlink(missing_ok=True)
    return from_bytes(pixels(image))


def generated(model: Model, given: Mapping[str, Any], report: Report) -> Tensor:
    """A picture (3, H, W) in [-1, 1] of the prompt and seed, to be dragged."""
    steps = given["sampling.num_inference_steps"]
    model.check_steps(steps)
    seed = given["seed"]
    if not isinstance(seed, int) or not 0 <= seed < 2**40:
        raise ValueError(f"seed: expected 0 to {2**40 - 1}, got {seed}")
    pipe = model.backbone.pipeline
    set_scheduler(pipe, "ddim")

    def show(what: str, image: Tensor) -> None:
        report(view.pictures({what: image}))

    with watched(pipe, model.watch(report, show), "picture"):
        seeds = image_seeds(seed, [0])
        return generate(pipe, [given["prompt"]], seeds=seeds, num_inference_steps=steps, guidance_scale=2.0)[0]


def words(model: Model, reference: Path, given: Mapping[str, Any]) -> list[str]:
    """The overrides of rg.edit of what the fields say; raises ValueError for what no setting would refuse."""
    model.check_steps(given["sampling.num_inference_steps"])
    rows = parse_json(given["drag"] or "[]", "drag")
    if not isinstance(rows, list) or not 1 <= len(rows) <= MAX_ARROWS:
        raise ValueError(
            f"drag: expected 1 to {MAX_ARROWS} arrows [from x, from y, to x, to y], got {given['drag'][:80]}"
        )
    drag = str(rows).replace(" ", "")
    names = ("correspondence", "appearance")
    terms = ",".join(f"{{head: {name}, weight: {float(given[name])}}}" for name in names if given[name])
    settings = {"reference": reference, "drag": drag, "terms": f"[{terms}]"}
    settings |= {name: given[name] for name in ("prompt", "guidance.strength", "sampling.num_inference_steps", "seed")}
    return ["+experiment=drag", *model.words, *(f"{name}={value}" for name, value in settings.items())]


def make(model: Model, inversions: Inversions, given: Mapping[str, Any], report: Report) -> str:
    """A job: the picture before and after, as HTML; kept in a run folder."""
    if given["picture"] is None:
        raise ValueError("reference: expected a picture, got none: upload one, or make one")
    with model.run("rg.edit") as run:
        file = run.folder / "given.png"
        save_image(given["picture"], file)
        cfg = run.compose(words(model, file, given))
        so_far: dict[str, Tensor | None] = {"before": given["picture"], "reference": None, "guided": None}

        def show(what: str, image: Tensor) -> None:
            so_far[what] = image
            report(view.pictures(so_far))

        key = inversions.key(file, given["prompt"], given["sampling.num_inference_steps"])
        noise = inversions.find(key)
        edit = Edit(cfg, run.folder, backbone=model.backbone, noise=noise, watch=model.watch(report, show))
        guided = edit.run()
        inversions.keep(key, edit.noise)
    return view.before_after(edit.rows["reference"][0], guided[0]) + view.command(run.command, run.folder)


def build(model: Model) -> None:
    """Adds the tab's components, inside a gr.Tab."""
    errors, fields, inversions = view.Errors(), {}, Inversions()
    picture = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            file = gr.File(label="A picture", file_types=["image"], elem_id="drag-file", height=110)
            errors.below("reference")
            view.drag_editor(model.size, "drag-rows", "drag-picture")
            given = gr.HTML(elem_id="drag-picture", visible="hidden")
            fields["drag"] = gr.Textbox(
                label="The arrows as [from x, from y, to x, to y]", elem_id="drag-rows", lines=1
            )
            errors.below("drag")
        with gr.Column(scale=1, min_width=300):
            model.add_prompt(fields, errors)
            model.add_sampling(fields, errors)
            draw = gr.Button("Make a picture to drag", elem_id="drag-draw")
            with gr.Row():
                fields["correspondence"] = gr.Slider(0, 3, 1, step=0.1, label="Correspondence")
                fields["appearance"] = gr.Slider(0, 3, 0, step=0.1, label="Appearance")
            errors.below("terms")
            fields["guidance.strength"] = gr.Slider(0, 3, 1, step=0.05, label="Strength")
            errors.below("guidance.strength")
            with gr.Row():
                begin = gr.Button("Drag", variant="primary", elem_id="drag-make")
                stop = gr.Button("Stop", variant="stop", elem_id="drag-stop")
            errors.below("")
            shown = gr.HTML(elem_id="drag-result")

    def take(make_it: Any, given: Mapping[str, Any], report: Report) -> tuple[str, Tensor]:
        made = make_it(given, report)
        return view.pictures({"before": made}), made

    model.bind(draw, None, partial(take, partial(generated, model)), fields, given, errors, keep=picture)
    read = partial(take, lambda fields, report: upload(model, fields))
    model.bind(file.upload, None, read, {"reference": file}, given, errors, keep=picture)
    inputs = {**fields, "picture": picture}
    model.bind(begin, stop, partial(make, model, inversions), inputs, shown, errors)
