"""How a finished checkpoint gets its name, and how those that retention gives up lose theirs.

Killed at any instant, the latest file names a whole checkpoint, once `retain.clean` has run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_sip.checkpoint.latest import LATEST, checkpoint_folder, saved_iterations
from megatron_sip.checkpoint.manifest import DamagedError, listed, sync_folder, write_durably
from megatron_sip.checkpoint.retain import INCOMPLETE, REPLACED, remove, surplus
from megatron_sip.config.groups import CheckpointConfig
from megatron_sip.errors import CheckpointError


def incomplete_folder(root: Path, iteration: int) -> Path:
    """Where a checkpoint is written before it has its name."""
    final = checkpoint_folder(root, iteration)
    return final.with_name(final.name + INCOMPLETE)


def give_name(root: Path, iteration: int) -> None:
    """Rename the folder of a finished checkpoint, and write its iteration into the latest file.

    Raises:
        OSError: one of the two could not be done; the checkpoint before is still the newest.
    """
    final = checkpoint_folder(root, iteration)
    # One of the same iteration stays until the new one is named: a crash in between must not leave nothing.
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
    incomplete_folder(root, iteration).rename(final)
    sync_folder(root)
    fresh = (root / LATEST).with_suffix(".tmp")
    write_durably(fresh, f"{iteration}\n".encode())
    fresh.replace(root / LATEST)
    sync_folder(root)
    if replaced.exists():
        shutil.rmtree(replaced)


def retire(rule: CheckpointConfig, root: Path, newest: int) -> str | None:
    """Delete what retention gives up, now that `newest` is named.

    Only whole checkpoints count, so that a damaged one is no reason to lose one.

    Returns:
        What went wrong, for the log: the newest checkpoint is safe all the same.
    """
    if rule.keep_last_n is None and rule.save_retain_interval is None:
        return None
    try:
        whole = [found for found in saved_iterations(root) if _is_whole(checkpoint_folder(root, found))]
        going = surplus(whole, newest, keep_last_n=rule.keep_last_n, retain_interval=rule.save_retain_interval)
        remove(root, going)
    except OSError as error:
        return f"an old checkpoint could not be deleted: {error}; look at the folder of --save"
    return None


def _is_whole(folder: Path) -> bool:
    try:
        listed(folder)
    except (DamagedError, CheckpointError):  # damaged, or of another version: neither counted nor deleted
        return False
    return True
