"""Scripts and configurations behind each shipped weight, table and figure."""

from rg import cli  # noqa: F401  answers --help before torch is loaded
