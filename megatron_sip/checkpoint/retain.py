"""Which checkpoints are kept, how the others go, and what a killed run leaves behind.

A folder is renamed before it is deleted, so that a checkpoint is either whole under its name or not there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from megatron_sip.checkpoint.latest import checkpoint_folder
from megatron_sip.checkpoint.manifest import sync_folder

INCOMPLETE = ".incomplete"
"""A save that is under way, or was killed."""
REPLACED = ".replaced"
"""A checkpoint whose successor of the same iteration is not named yet."""
DELETED = ".deleted"
"""A checkpoint that retention took away."""

_LEFT = re.compile(rf"iter_\d{{7,}}(?:{re.escape(INCOMPLETE)}|{re.escape(REPLACED)}|{re.escape(DELETED)})")


def surplus(
    iterations: Iterable[int], newest: int, *, keep_last_n: int | None, retain_interval: int | None
) -> list[int]:
    """The iterations whose checkpoints go now that the one of `newest` is durable and named.

    iterations  in the order in which they were written

    Kept are the newest `keep_last_n` up to `newest` and every multiple of `retain_interval`. With an interval alone
    only the newest stays besides, as in Megatron. Without either everything stays. Checkpoints beyond `newest` are
    of another history of the run and are not touched.
    """
    if keep_last_n is None and retain_interval is None:
        return []
    past = [iteration for iteration in iterations if iteration <= newest]
    kept = set(past[-(keep_last_n or 1) :]) | {newest}
    if retain_interval is not None:
        kept |= {iteration for iteration in past if iteration % retain_interval == 0}
    return [iteration for iteration in past if iteration not in kept]


def remove(root: Path, iterations: Iterable[int]) -> None:
    """Delete checkpoints; killed in between, each is whole or has lost its name.

    Raises:
        OSError: one cannot be renamed or deleted.
    """
    gone = []
    for iteration in iterations:
        folder = checkpoint_folder(root, iteration)
        target = folder.with_name(folder.name + DELETED)
        if target.exists():
            shutil.rmtree(target)
        gone.append(folder.rename(target))
    if gone:
        sync_folder(root)
    for target in gone:
        shutil.rmtree(target)


def clean(root: Path) -> list[str]:
    """Put in order what a killed run left in its --save folder; what was done, for the log.

    Raises:
        OSError: something cannot be renamed or deleted.
    """
    done = []
    left = [entry for entry in root.iterdir() if _LEFT.fullmatch(entry.name) and not entry.is_symlink()]
    for entry in sorted(left):
        own = entry.with_suffix("")
        if entry.suffix == REPLACED and not own.exists():
            entry.rename(own)
            done.append(f"{own.name} put back, which an interrupted save had moved away")
            continue
        shutil.rmtree(entry)
        if entry.suffix == INCOMPLETE:
            done.append(f"{entry.name} of an interrupted save removed")
    if left:
        sync_folder(root)
    return done
