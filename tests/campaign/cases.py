"""Cases of every kind, each drawn from (seed, kind, number) alone."""

import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.campaign import watch
from tests.campaign.kinds import FILES, Kind
from tests.campaign.mutate import mutate
from tests.campaign.settings import SETTINGS, Command

KINDS: dict[str, Kind | Command] = {**FILES, **SETTINGS}


def run_cases(kinds: Mapping[str, Kind | Command], place: Path, *, seed: int, count: int) -> list[dict[str, Any]]:
    """About `count` cases in all, by the kinds' weights, each in a copy of its kind's files below `place`."""
    watch.prepare()
    total, cases = sum(kind.weight for kind in kinds.values()), []
    for name, kind in kinds.items():
        whole = place / f"{list(kinds).index(name):02d}"
        whole.mkdir()
        kind.make(whole)
        expected = "" if isinstance(kind, Command) else baseline(kind, whole)
        for number in range(max(1, round(count * kind.weight / total))):
            rng = np.random.default_rng((seed, zlib.crc32(name.encode()), number))
            if isinstance(kind, Command):
                mutation, outcome = kind.case(whole, rng)
            else:
                mutation, outcome = run_case(kind, whole, expected, rng)
            case = {"kind": name, "number": number, "mutation": mutation}
            cases.append({**case, "outcome": outcome.name, "detail": outcome.detail})
    return cases


def baseline(kind: Kind, whole: Path) -> str:
    """The digest of what is read where nothing was changed."""
    before = Path.cwd()
    os.chdir(whole)
    try:
        found = kind.read(whole)
    finally:
        os.chdir(before)
    return watch.digest(found.content if isinstance(found, watch.Report) else found)


def run_case(kind: Kind, whole: Path, expected: str, rng: np.random.Generator) -> tuple[str, watch.Outcome]:
    """One changed file and what its reader made of it."""
    folder = whole.with_name(f"{whole.name}-case")
    shutil.copytree(whole, folder, symlinks=True)
    try:
        files = sorted(path for path in folder.glob(kind.mutated) if path.is_file())
        chosen = files[int(rng.integers(len(files)))]
        way = mutate(chosen, rng)
        named = (chosen.name, *kind.named)
        outcome = watch.run(lambda: kind.read(folder), folder, named, expected)
    finally:
        shutil.rmtree(folder)
    return f"{way} {chosen.relative_to(folder)}", outcome
