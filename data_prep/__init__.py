"""Label making: data sources, annotators, the marionette renderer and the command that writes shards."""

from rg import cli  # noqa: F401  answers --help before torch is loaded
