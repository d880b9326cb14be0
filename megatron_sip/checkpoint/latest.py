"""Which checkpoint is the newest, and why one cannot be read; without megatron-core, so that small tools can ask too.

<save>/iter_0000020/
<save>/latest_checkpointed_iteration.txt     "20"
"""

from __future__ import annotations

from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

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


def first_line(error: BaseException) -> str:
    """The cause of a failed read or write in one line.

    torch wraps what failed on a rank in a CheckpointException (a BaseException) that spells every rank's traceback;
    the cause is the rank's own error.
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
