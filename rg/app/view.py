"""What a tab shows: pictures, tables, errors beside their fields, and the editors drawn over pictures. HTML alone."""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image
from torch import Tensor

from rg.io.images import to_bytes
from rg.points import COLORS, KEYPOINTS, LIMBS, MIRROR, Size

STATIC = Path(__file__).parent / "static"
MAX_TEXT = 2**20  # bytes of a pose


def source(image: Tensor) -> str:
    """An image (3, H, W) in [-1, 1] as the address of a PNG that holds it: no file is served."""
    data = io.BytesIO()
    Image.fromarray(to_bytes(image).permute(1, 2, 0).numpy()).save(data, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def pictures(images: Mapping[str, Tensor | None]) -> str:
    """Pictures side by side, each (3, H, W) in [-1, 1], or a place for one that is still to come."""
    figures = []
    for name, image in images.items():
        shown = '<img alt="">' if image is None else f'<img data-name="{name}" alt="{name}" src="{source(image)}">'
        shape = "1" if image is None else f"{image.shape[-1]}/{image.shape[-2]}"
        figures.append(f'<figure style="--shape: {shape}">{shown}<figcaption>{name}</figcaption></figure>')
    return f'<div class="pictures">{"".join(figures)}</div>'


def command(line: str, folder: Path) -> str:
    """How a result is made again, and where it lies."""
    return f'<pre class="command">{html.escape(line)}</pre><div class="state">kept in {html.escape(str(folder))}</div>'


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """A table of texts, each with a class of page.css."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in (title, *columns))
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f'<td class="{kind}">{text}</td>' for text, kind in cells)
        + "</tr>"
        for name, cells in rows
    )
    parts = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="scores">{parts}</table></div>'


def wrong(message: str) -> str:
    """An error as it stands below its field; nothing for no message."""
    return f'<p class="wrong" role="alert">{html.escape(message)}</p>' if message else ""


class Errors:
    """The places below a tab's fields where what is wrong with them is said.

    A field is known by the name that errors of the commands begin with, such as `guidance.strength`; what names no
    field of the tab is said in the place of "".
    """

    def __init__(self) -> None:
        self.places: dict[str, gr.HTML] = {}

    def below(self, name: str) -> None:
        """Adds the place of a field, where it is called."""
        self.places[name] = gr.HTML(elem_classes=f"error-{name.replace('.', '-')}" if name else "error-tab")

    @property
    def components(self) -> list[gr.HTML]:
        return list(self.places.values())

    def say(self, message: str = "") -> list[str]:
        """The values of `components` with a message, without one all empty."""
        found = re.match(r"[\w.]+", message)
        named = found[0] if found else ""
        owner = next((name for name in self.places if name and named in (name, name.split(".")[-1])), "")
        return [wrong(message) if name == owner else "" for name in self.places]


def pose_editor(size: Size, field: str, result: str) -> gr.HTML:
    """An editor of poses on images of a size, over the picture of `result`; the pose is in the text of `field`.

    Args:
        field, result: elem_ids of a Textbox and of the HTML that holds the pictures.
    """
    poses = json.loads((STATIC / "poses.json").read_text(encoding="utf-8"))
    examples = [{"name": name, "keypoints": _moved(pose, size)} for name, pose in poses.items()]
    buttons = {
        "hide": "Hide or show joint",
        "mirror": "Mirror",
        "add": "Add person",
        "remove": "Remove person",
        "undo": "Undo",
        "save": "Save JSON",
    }
    bar = "".join(f'<button type="button" data-do="{name}">{text}</button>' for name, text in buttons.items())
    options = "".join(f'<option value="{number}">{pose["name"]}</option>' for number, pose in enumerate(examples))
    bar += f'<select aria-label="example">{options}</select>'
    bar += '<label class="file">Load JSON<input type="file" accept=".json,application/json"></label>'
    bar += '<label><input type="checkbox" checked> picture behind</label>'
    template = (
        f'<div class="canvas pose"><svg viewBox="0 0 {size[1]} {size[0]}" tabindex="0" aria-label="pose editor">'
        f'<image width="{size[1]}" height="{size[0]}" href=""></image></svg>'
        f'<div class="said" aria-live="polite"></div><div class="bar">{bar}</div></div>'
    )
    setup = {
        "size": size,
        "field": field,
        "result": result,
        "examples": examples,
        "names": KEYPOINTS,
        "limbs": LIMBS,
        "colors": COLORS,
        "mirror": MIRROR,
        "bytes": MAX_TEXT,
    }
    return editor(template, "pose.js", setup)


def drag_editor(size: Size, field: str, result: str) -> gr.HTML:
    """Arrows over the first picture of `result`; they are in the text of `field`, see `pose_editor`."""
    template = (
        f'<div class="canvas arrows"><svg viewBox="0 0 {size[1]} {size[0]}" aria-label="drag editor">'
        f'<image width="{size[1]}" height="{size[0]}" href=""></image></svg><div class="said" aria-live="polite"></div>'
        '<div class="bar"><button type="button" data-do="undo">Undo</button>'
        '<button type="button" data-do="clear">Clear</button></div></div>'
    )
    return editor(template, "drag.js", {"size": size, "field": field, "result": result})


def before_after(before: Tensor, after: Tensor) -> str:
    """Two pictures of one size over each other, and a slider that moves the border between them."""
    shape = f"{before.shape[-1]}/{before.shape[-2]}"
    return (
        f'<div class="compare" style="--shape: {shape}"><img data-name="reference" alt="before" src="{source(before)}">'
        f'<img class="after" data-name="guided" alt="after" src="{source(after)}">'
        '<input type="range" min="0" max="100" value="50" aria-label="before and after" '
        "oninput=\"this.parentNode.style.setProperty('--share', this.value + '%')\"></div>"
        '<div class="state">left of the border before, right of it after</div>'
    )


def editor(template: str, script: str, setup: Mapping[str, Any]) -> gr.HTML:
    """A component of one's own: its HTML, and the script of static/ that makes it work, which finds SETUP."""
    code = (STATIC / script).read_text(encoding="utf-8")
    return gr.HTML(html_template=template, js_on_load=f"const SETUP = {json.dumps(setup)};\n{code}")


def _moved(pose: dict[str, Any], size: Size) -> list[list[list[float]]]:
    across, down = size[1] / pose["size"][1], size[0] / pose["size"][0]
    return [
        [[(x + 0.5) * across - 0.5, (y + 0.5) * down - 0.5, visible] for x, y, visible in person]
        for person in pose["keypoints"]
    ]
