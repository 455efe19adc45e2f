"""The tables of the embedded model's card, from its results alone."""

from collections.abc import Iterable, Sequence
from typing import Any

ORDER = ("people", "portrait", "sky", "ground", "shirt", "trousers", "hat", "glasses", "hair", "hair_length")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _percent(found: dict[str, float] | None) -> str:
    return f"{found['share']:.1%} ± {found['sem']:.1%}" if found else "-"


def _distance(found: dict[str, float]) -> str:
    return f"{found['value']:.4f} ± {found['sem']:.4f}"


def _sets(figures: dict[str, Any]) -> list[str]:
    """The scales, then the ceiling."""
    return [*sorted(name for name in figures if name != "ceiling"), "ceiling"]


def _names(found: Iterable[str]) -> list[str]:
    return [name for name in (*ORDER, "pair", "all", "every") if name in set(found)]


LABELS = {"all": "**all of these**", "every": "all right at once", "pair": "shirt and trousers at once"}


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def main_table(results: dict[str, Any]) -> str:
    """Distances and people found."""
    sets = _sets(results["people_found"])
    rows = []
    for form, label in (("raw", "kernel distance"), ("standardised", "the same, standardised features")):
        rows.append([label, *(_distance(results["kernel_distance"][form][name]) for name in sets)])
    for kind, label in (("one", "person"), ("two", "both people")):
        for key in ("found", "whole"):
            cells = [_percent(results["people_found"][name].get(kind, {}).get(key)) for name in sets]
            rows.append([f"{label} {'found' if key == 'found' else 'found whole'}", *cells])
    return table(["", *sets], rows)


def fidelity_table(results: dict[str, Any], group: str) -> str:
    """Fidelity by attribute for pictures of one person ("alone") or "two"."""
    found = {name: results["fidelity"][name][group] for name in _sets(results["fidelity"])}
    rows = [[_label(k), *(_percent(f.get(k)) for f in found.values())] for k in _names(found["ceiling"])]
    return table(["", *found], rows)


def unseen_table(results: dict[str, Any]) -> str:
    """Fidelity on pairs of colours that are never together in training."""
    found = results["unseen_pairs"]
    rows = [[_label(k), *(_percent(found[s].get(k)) for s in ("samples", "ceiling"))] for k in _names(found["samples"])]
    return table(["", "samples", "ceiling"], rows)


def changed_table(results: dict[str, Any]) -> str:
    """What changing one colour word changes."""
    keys = ("flipped", "others", "both")
    rows = [
        [_label(name), *(_percent(found[source][key]) for source in ("samples", "ceiling") for key in keys)]
        for name, found in results["changed_words"].items()
    ]
    header = ["word", "it flips", "nothing else does", "both at once"]
    return table([*header, *(f"ceiling: {key}" for key in header[1:])], rows)


def former_table(results: dict[str, Any], former: dict[str, Any]) -> str:
    """The figures that the former model has too, each beside its own ceiling."""
    rows = []
    scales = [name for name in _sets(results["people_found"])[:-1] if name in former["whole_person"]]
    for form, label in (("raw", "kernel distance"), ("standardised", "the same, standardised")):
        both = [model["kernel_distance"][form] for model in (results, former)]
        rows += [
            [f"{label}, {name}", *(_beside(*(d[n]["value"] for n in (name, "ceiling"))) for d in both)]
            for name in scales
        ]
    for name in scales:
        both = [(results["people_found"][n]["one"]["whole"], former["whole_person"][n]) for n in (name, "ceiling")]
        rows.append([f"person found whole, {name}", *(_of(*pair) for pair in zip(*both, strict=True))])
    for key in former["fidelity"]["ceiling"]:
        for name in scales:
            both = [(results["fidelity"][n]["alone"][key], former["fidelity"][n][key]) for n in (name, "ceiling")]
            rows.append([f"{key} as asked for, {name}", *(_of(*pair) for pair in zip(*both, strict=True))])
    for key, label in (("mean", "of the mean"), ("sampled", "of a sample")):
        rows.append([f"autoencoder, PSNR {label}, dB", *(f"{model['psnr'][key]:.2f}" for model in (results, former))])
    counts = [sum(results["parameters"].values()), former["parameters"]]
    rows.append(["parameters, million", *(f"{count / 1e6:.1f}" for count in counts)])
    return table(["figure (ceiling)", "this model", "the former"], rows)


def _beside(value: float, ceiling: float) -> str:
    return f"{value:.4f} ({ceiling:.4f})"


def _of(found: dict[str, float], ceiling: dict[str, float]) -> str:
    return f"{found['share']:.1%} ({ceiling['share']:.1%})"
