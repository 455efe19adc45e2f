"""A table of all evaluations of a sweep, best first: python -m experiments.sweep_table outputs/sweep_guidance"""

import json
import sys
from pathlib import Path

import yaml

from rg.evaluation import write_text


def sweep_table(folder: Path) -> str:
    """One row per finished run below `folder`: its overrides, PCK at every alpha, detector confidence.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    runs = []
    for path in sorted(folder.glob("*/results.json")):
        if path.parent.is_symlink():
            continue
        overrides = yaml.safe_load((path.parent / ".hydra" / "overrides.yaml").read_text())
        runs.append((json.loads(path.read_text()), [o for o in overrides if not o.startswith("+")]))
    if not runs:
        raise FileNotFoundError(f"{folder}: expected runs with results.json, found none")
    common = set.intersection(*(set(overrides) for _, overrides in runs)) if len(runs) > 1 else set()
    alphas = list(runs[0][0]["pck"])
    lines = [
        "| " + " | ".join(["settings", *(f"PCK@{a}" for a in alphas), "confidence", "images"]) + " |",
        "|---" * (len(alphas) + 3) + "|",
    ]
    for results, overrides in sorted(runs, key=lambda run: -run[0]["pck"][alphas[0]]["guided"]["mean"]):
        cells = [" ".join(o for o in overrides if o not in common)]
        cells += [f"{results['pck'][alpha]['guided']['mean']:.3f}" for alpha in alphas]
        cells += [f"{results['confidence']['guided']['mean']:.3f}", str(results["images"])]
        lines.append("| " + " | ".join(cells) + " |")
    reference = runs[0][0]
    for name in ("unguided", "ceiling"):
        cells = [name, *(f"{reference['pck'][alpha][name]['mean']:.3f}" for alpha in alphas)]
        cells += [f"{reference['confidence'][name]['mean']:.3f}", str(reference["images"])]
        lines.append("| " + " | ".join(cells) + " |")
    return f"In common: {' '.join(sorted(common)) or 'nothing'}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Prints the table of the folder given, and writes it there."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/sweep_guidance")
    content = sweep_table(folder)
    write_text(folder / "table.md", content)
    print(content + f"\n{folder / 'table.md'}")


if __name__ == "__main__":
    main()
