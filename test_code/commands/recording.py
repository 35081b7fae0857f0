"""Read and write the recording of what the commands do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent / "data" / "commands.json"


def read() -> dict[str, Any]:
    """Return the recording."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(content: dict[str, Any]) -> None:
    """Replace the recording."""
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
