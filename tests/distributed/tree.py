"""What lies in a folder, for tests that nothing in it may change."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_of_tree(root: Path) -> dict[str, str]:
    """sha256 of every file below `root` by its relative name; folders by their names with a slash."""
    return {
        str(path.relative_to(root)) + "/" * path.is_dir(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(root.rglob("*"))
    }
