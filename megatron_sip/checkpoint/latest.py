"""Which checkpoint is the newest whole one, and why one cannot be read; without megatron-core, for small tools too.

<save>/iter_0000020/
<save>/latest_checkpointed_iteration.txt     "20"
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_sip.checkpoint.manifest import MANIFEST, DamagedError, listed, require_bytes
from megatron_sip.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
_FOLDER = re.compile(r"iter_(\d{7,})")
_APART = 0.001
"""Seconds between two checkpoints at least, as their manifests tell."""


def same_folder(one: str | Path, other: str | Path | None) -> bool:
    """Whether two paths name one folder."""
    return other is not None and Path(one).resolve() == Path(other).resolve()


def checkpoint_folder(root: Path, iteration: int) -> Path:
    """Folder of one checkpoint."""
    return root / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """The iteration that a folder's name tells; None for any other name."""
    found = _FOLDER.fullmatch(folder.name)
    return int(found[1]) if found and checkpoint_folder(folder.parent, int(found[1])).name == folder.name else None


def named_iteration(root: Path) -> int | None:
    """The iteration that the latest file names, whether or not its folder is whole; None without that file.

    Raises:
        CheckpointError: the latest file is damaged.
    """
    file = root / LATEST
    if not file.exists():
        return None
    try:
        text = file.read_text(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; restore it") from error
    if not (text.isascii() and text.isdigit()):
        raise CheckpointError(f"{file} holds {text[:40]!r}, not an iteration; write the wanted iteration into it")
    return int(text)


def latest_iteration(root: Path) -> int | None:
    """Iteration of the newest named checkpoint, or None if `root` holds none.

    Raises:
        CheckpointError: the latest file is damaged or names a folder that is not there.
    """
    named = named_iteration(root)
    if named is not None and not checkpoint_folder(root, named).is_dir():
        raise CheckpointError(
            f"{root / LATEST} names iteration {named}, but {checkpoint_folder(root, named)} is missing; "
            "restore it or write an iteration that is there into the file"
        )
    return named


def saved_iterations(root: Path) -> list[int]:
    """Iterations that have a folder under `root`, in the order in which they were written.

    Where the time is not known (no manifest) they come first, by number. Links to elsewhere do not count.
    """
    found: dict[int, float] = {}
    for folder in root.iterdir() if root.is_dir() else ():
        iteration = iteration_of(folder)
        if iteration is not None and folder.is_dir() and not folder.is_symlink():
            found[iteration] = written_at(folder)
    return sorted(found, key=lambda iteration: (found[iteration], iteration))


def written_at(folder: Path) -> float:
    """When a checkpoint was written, by its own manifest, in seconds since 1970; 0 where that is not known."""
    try:
        told = json.loads((folder / MANIFEST).read_bytes())
        return float(told["written"]) if told["iteration"] == iteration_of(folder) else 0.0
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0  # of an early version, or damaged: `newest_whole` will tell


def next_time(root: Path) -> float:
    """The time of a checkpoint that is written now, in seconds since 1970: behind that of all that stand under `root`.

    A run may go on on a host whose clock is behind; what was written last must be told as the last all the same.
    """
    last = max((written_at(checkpoint_folder(root, iteration)) for iteration in saved_iterations(root)), default=0.0)
    return max(time.time(), last + _APART)


def candidates(root: Path, named: int | None = None, among: Collection[int] | None = None) -> list[int]:
    """Iterations that may be loaded, the best first: the named one, then what was written before it on the way there.

    named   that of the latest file if it is not given
    among   leave all others alone, which are of an earlier run; None: all may be loaded

    A checkpoint beyond the named one is left alone: who wrote an earlier number into the latest file wants that one.
    So is one with a higher number than another that was written later: the run had gone back behind it. Without the
    latest file (lost, or not there yet when the first save was killed) the last one that was written comes first.

    Raises:
        CheckpointError: the latest file is damaged.
    """
    saved = [iteration for iteration in saved_iterations(root) if among is None or iteration in among]
    named = named_iteration(root) if named is None else named
    if among is not None and named not in among:
        named = None
    if named is None and not saved:
        return []
    found = [saved[-1] if named is None else named]
    # What was written behind the named one is of another course. A damaged manifest tells no time to go by.
    timed = found[0] in saved and written_at(checkpoint_folder(root, found[0])) > 0
    for iteration in reversed(saved[: saved.index(found[0])] if timed else saved):
        if iteration < found[-1]:
            found.append(iteration)
    return found


def whole_problem(folder: Path) -> str | None:
    """Why a checkpoint folder is not whole, by reading all of it; None if it is.

    Raises:
        CheckpointError: a newer version wrote it, or it would run code.
    """
    try:
        manifest = listed(folder)
        require_bytes(folder, manifest, manifest.files)
    except DamagedError as error:
        return str(error)
    return None


def newest_whole(
    root: Path,
    say: Callable[[str], None],
    problem_of: Callable[[Path], str | None] = whole_problem,
    iterations: list[int] | None = None,
) -> int | None:
    """Iteration of the newest checkpoint that is whole; damaged ones and a lost latest file are told to `say`.

    problem_of   why a folder is not whole; the ranks of a run pass one that shares the work
    iterations   `candidates(root)` where it is known

    Returns:
        None if `root` holds no checkpoint.

    Raises:
        CheckpointError: there are checkpoints and none is whole; a newer version wrote one; or it would run code.
    """
    iterations = candidates(root) if iterations is None else iterations
    lost = [f"{root / LATEST} is missing"] if iterations and not (root / LATEST).exists() else []
    damaged: list[str] = []
    for iteration in iterations:
        folder = checkpoint_folder(root, iteration)
        problem = problem_of(folder)
        if problem is None:
            if damaged:
                say(f"WARNING: {'; '.join(lost + damaged)}; taking {folder}, the newest whole checkpoint before it")
            elif lost:
                say(f"WARNING: {lost[0]}; taking {folder}, the last one written. For another, write its number there")
            return iteration
        damaged.append(f"{folder} is damaged: {problem}")
    if damaged:
        trouble = "; ".join(lost + damaged)
        raise CheckpointError(f"{trouble}; no whole checkpoint is left under {root}. Restore one of them")
    return None


def cause(error: BaseException) -> BaseException:
    """The error itself, behind torch's CheckpointException (a BaseException) that wraps what failed on a rank."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def first_line(error: BaseException) -> str:
    """The cause of a failed read or write in one line; a CheckpointException spells every rank's traceback."""
    error = cause(error)
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]
