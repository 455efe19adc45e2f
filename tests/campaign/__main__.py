"""Mutates files and settings, runs their readers and counts how that ended: python -m tests.campaign seed=0 n=100

kinds=head,shards takes some kinds alone, out=campaign.json is where every case is written.
"""

import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

from tests.campaign.cases import KINDS, run_cases
from tests.campaign.watch import BAD, DIFFERENT, OUTCOMES


def table(cases: list[dict[str, Any]]) -> str:
    """Markdown: a row per kind, a column per outcome."""
    counts = Counter((case["kind"], case["outcome"]) for case in cases)
    kinds = list(dict.fromkeys(case["kind"] for case in cases))
    lines = [f"| kind | cases | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
    for name in [*kinds, "all"]:
        row = [sum(counts[kind, outcome] for kind in (kinds if name == "all" else [name])) for outcome in OUTCOMES]
        lines.append(f"| {name} | {sum(row)} | {' | '.join(str(count or '') for count in row)} |")
    return "\n".join(lines)


def main(words: list[str]) -> int:
    settings = {"seed": "0", "n": "100", "kinds": ",".join(KINDS), "out": "campaign.json"}
    settings |= dict(word.split("=", 1) for word in words)
    begin = time.monotonic()
    chosen = {name: kind for name, kind in KINDS.items() if name in settings["kinds"].split(",")}
    with tempfile.TemporaryDirectory() as place:
        cases = run_cases(chosen, Path(place), seed=int(settings["seed"]), count=int(settings["n"]))
    for case in cases:
        if case["outcome"] in BAD:
            print(f"{case['kind']}: {case['mutation']}: {case['outcome']}: {case['detail']}")
    silent = Counter((case["kind"], case["mutation"].split(" ")[0]) for case in cases if case["outcome"] == DIFFERENT)
    print("\nsilently different:", ", ".join(f"{kind}: {way} {n}" for (kind, way), n in sorted(silent.items())))
    print(f"\nseed {settings['seed']}, {time.monotonic() - begin:.0f} s\n\n{table(cases)}")
    Path(settings["out"]).write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")
    return int(any(case["outcome"] in BAD for case in cases))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
