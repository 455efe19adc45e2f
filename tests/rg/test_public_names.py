import subprocess
import sys
from importlib import import_module

import pytest

import rg


@pytest.mark.parametrize("name", rg.__all__)
def test_every_public_name_is_the_object_of_that_name(name):
    found = getattr(rg, name)
    assert found.__name__ == name and getattr(import_module(found.__module__), name) is found


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'rg'.*'SpatialHeads'"):
        _ = rg.SpatialHeads


def test_importing_the_package_loads_nothing_heavy(root):
    code = "import sys, rg; print(*(name for name in ('torch', 'diffusers', 'lightning') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_guidance_loads_no_lightning() -> None:
    code = "import sys; from rg import ReadoutGuidance; print(*{'lightning', 'torchmetrics'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
