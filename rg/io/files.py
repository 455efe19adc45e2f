"""Files that are whole or not there."""

import json
from pathlib import Path
from typing import Any


def write_text(path: Path, content: str | dict[str, Any]) -> None:
    """Writes text, or a record as JSON, under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
