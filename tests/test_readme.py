import re
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_readmes_code_runs_and_guides(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(root)
    (code,) = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    first, last = (names["guidance"].trace[i].energy for i in (0, -1))
    assert [image.size for image in names["images"]] == [(64, 64)] * 2
    assert (last < first).all()


def test_every_file_that_the_readme_names_is_there(root: Path):
    named = re.findall(r"\((docs/[^)]+)\)|(?:^|[ \"])(docs/[\w./-]+)", (root / "README.md").read_text(), re.MULTILINE)
    assert named
    assert all((root / (link or path)).is_file() for link, path in named), named
