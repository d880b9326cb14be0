"""A bench as its user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def figures_of(bench: ModuleType, flags: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What a run with these flags writes to its JSON, and what it prints; it must end well."""
    file = folder / "figures.json"
    command = [sys.executable, str(bench.__file__), *flags.split(), "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(file.read_text())
    return figures, done.stdout
