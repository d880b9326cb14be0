"""Which checkpoint is the newest; known without megatron-core, so that small tools can ask too.

<save>/iter_0000020/
<save>/latest_checkpointed_iteration.txt     "20"
"""

from __future__ import annotations

from pathlib import Path

from megatron_sip.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """Folder of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def latest_iteration(root: Path) -> int | None:
    """Iteration of the newest complete checkpoint, or None if `root` holds none.

    Raises:
        CheckpointError: the latest file is damaged or names a folder that is not there.
    """
    file = root / LATEST
    if not file.exists():
        return None
    text = file.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{file} holds {text[:40]!r}, not an iteration; write the wanted iteration into it")
    if not checkpoint_folder(root, int(text)).is_dir():
        raise CheckpointError(
            f"{file} names iteration {text}, but {checkpoint_folder(root, int(text))} is missing; "
            "restore it or write an iteration that is there into the file"
        )
    return int(text)
