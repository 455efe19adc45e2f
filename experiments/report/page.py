"""The page: one HTML file with its images inside, no request to anywhere, light and dark, for desks and telephones."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from experiments.report.figures import Figure
from experiments.report.store import Store
from experiments.report.summary import Finding
from rg.points import LIMBS

Rows = Sequence[tuple[Finding, str, int]]

HERE = Path(__file__).parent
STYLE, PAGE = ((HERE / f"page.{end}").read_text(encoding="utf-8") for end in ("css", "html"))
CAPTIONS = {
    "ceiling": "what the control is of",
    "ours": "guided",
    "raw_features": "raw features",
    "raw_limb": "raw, 4 points",
}
NOTICE = (
    '<p class="notice">This is the reduced report: few images and at most 25 steps, so intervals are wide. '
    "<code>make report</code> makes the full one.</p>"
)


def page(store: Store, found: Mapping[str, tuple[Figure, Rows]], others: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page.

    Args:
        found: see `experiments.report.build.findings`.
        others: figures that other commands measure: {key: {"title", "text", "metric", "baseline", "ours", ...}}.
    """
    parts = {key: (figure.title, _section(store, figure, rows)) for key, (figure, rows) in found.items()}
    parts |= {key: (other.get("title", key), _other(key, other)) for key, other in others.items()}
    links = "".join(f'<a href="#{key}">{html.escape(title)}</a>' for key, (title, _) in parts.items())
    sections = "".join(section for _, section in parts.values())
    return Template(PAGE).substitute(style=STYLE, notice=NOTICE if store.quick else "", links=links, sections=sections)


def _section(store: Store, figure: Figure, rows: Rows) -> str:
    runs = dict.fromkeys(row.run for row in figure.rows if store.get(row.run))
    count = max(2, 6 // len(runs))
    shown = "".join(_examples(store, name, figure.shown, count, titled=len(runs) > 1) for name in runs)
    seconds = {words: taken for _, words, taken in rows}
    commands = "\n".join(html.escape(f"{words}   # {_time(taken)}") for words, taken in seconds.items())
    return (
        f'<section id="{figure.key}"><div class="key">{_label(figure.key)}</div><h2>{html.escape(figure.title)}</h2>'
        f"<p>{html.escape(figure.text)}</p>{_headline(rows[0][0])}{shown}{_table(rows)}<pre>{commands}</pre></section>"
    )


def _label(key: str) -> str:
    return f"Figure {key.removeprefix('fig')}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _headline(finding: Finding) -> str:
    return (
        f'<p class="head">{finding.baseline:.2f} → <strong>{finding.ours:.2f}</strong> '
        f"<small>{html.escape(finding.title)}; difference {finding.ours - finding.baseline:+.2f}, "
        f"{finding.low:+.2f} to {finding.high:+.2f}, {finding.n} images</small></p>"
    )


def _table(rows: Rows) -> str:
    lines = []
    for f, _, _ in rows:
        cells = [html.escape(f.title), f"{f.baseline:.3f}", f"<strong>{f.ours:.3f}</strong>"]
        cells += [f"{f.ours - f.baseline:+.3f} ({f.low:+.3f} to {f.high:+.3f})", str(f.n)]
        verdict = f'<td class="{"good" if f.met else "bad"}">{html.escape(f.verdict)}</td>'
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + verdict + "</tr>")
    names = ("", "baseline", "guided", "difference (95 % interval)", "images", "")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _examples(store: Store, name: str, shown: Sequence[str], count: int, *, titled: bool) -> str:
    """The first `count` examples of a run, a row of methods each."""
    stored, sheet = store.get(name), store.sheet(name)
    rows, columns = stored["sheet"]["rows"], stored["sheet"]["columns"]
    side = (sheet.width // columns, sheet.height // len(rows))
    methods = [method for method in shown if method in rows]
    examples = []
    for column in range(min(columns, count)):
        cells = []
        for method in methods:
            top = rows.index(method) * side[1]
            image = sheet.crop((column * side[0], top, (column + 1) * side[0], top + side[1]))
            marks = _marks(stored["marks"], method, column)
            drawing = f'<svg viewBox="0 0 {side[0]} {side[1]}">{marks}</svg>' if marks else ""
            caption = f"<figcaption>{html.escape(CAPTIONS.get(method, method.replace('_', ' ')))}</figcaption>"
            alt = html.escape(f"{name}, {method}, example {column + 1}")
            cells.append(f'<figure><div><img alt="{alt}" src="{_inline(image)}">{drawing}</div>{caption}</figure>')
        examples.append(f'<div class="example">{"".join(cells)}</div>')
    across = 2 if len(methods) <= 3 else 1
    title = f"<h3>{html.escape(name)}</h3>" if titled else ""
    return f'{title}<div class="examples" style="--columns: {across}">{"".join(examples)}</div>'


def _inline(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _marks(marks: Mapping[str, Any], method: str, column: int) -> str:
    """Arrow, box or skeleton of an example as SVG in pixels of the image, drawn twice: a dark edge below the colour."""
    paths = []
    if "arrows" in marks:
        x, y, to_x, to_y = (value + 0.5 for value in marks["arrows"][column])
        along, across = ((to_x - x) * 0.3, (to_y - y) * 0.3), ((y - to_y) * 0.18, (to_x - x) * 0.18)
        tips = [(to_x - along[0] + s * across[0], to_y - along[1] + s * across[1]) for s in (1, -1)]
        paths.append(f"M{x:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}")
        paths.append("M{:.1f} {:.1f}L{:.1f} {:.1f}L{:.1f} {:.1f}".format(*tips[0], to_x, to_y, *tips[1]))
    if "boxes" in marks:
        left, top, right, bottom = marks["boxes"][column][method != "reference"]
        paths.append(f"M{left:.1f} {top:.1f}H{right:.1f}V{bottom:.1f}H{left:.1f}Z")
    for points in marks.get(f"skeletons {method}", {column: ()})[column]:
        for a, b in LIMBS:
            (x, y), (to_x, to_y) = points[a], points[b]
            paths.append(f"M{x + 0.5:.1f} {y + 0.5:.1f}L{to_x + 0.5:.1f} {to_y + 0.5:.1f}")
    line = "".join(paths)
    ends = 'fill="none" stroke-linejoin="round" stroke-linecap="round"'
    return line and (
        f'<path d="{line}" {ends} stroke="#000" stroke-opacity=".55" stroke-width="1.5"/>'
        f'<path d="{line}" {ends} stroke="var(--mark)" stroke-width=".7"/>'
    )


def _other(key: str, other: Mapping[str, Any]) -> str:
    title, text = (html.escape(str(other.get(name, ""))) for name in ("title", "text"))
    head = f"{other['baseline']:.2f} → <strong>{other['ours']:.2f}</strong> <small>{html.escape(str(other['metric']))}"
    head += f", standard error of the difference {other['sem']:.3f}, {other['n']} images</small>"
    command = html.escape(f"{other['command']}   # {_time(other['seconds'])}")
    return (
        f'<section id="{key}"><div class="key">{_label(key)}</div><h2>{title}</h2><p>{text}</p>'
        f'<p class="head">{head}</p><pre>{command}</pre></section>'
    )
