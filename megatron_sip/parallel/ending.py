"""Ending a process at once, with a status that tells why; and what the kernel tells of other processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

FAILED = 1
"""An error that is a fault of ours, of a library or of the hardware; or a rank that died."""
REFUSED = 2
"""An error that the user can mend."""
HUNG = 3
"""A stage made no progress within its `--stage-timeout`."""
NOT_AGREED = 4
"""Asked to stop, the ranks did not agree in time; nothing was saved."""
ORPHANED = 5
"""The launcher ended, or its store."""

WRITER_THREAD = "checkpoint"
"""Name of the threads that write checkpoints."""
_FLUSH_SECONDS = 1.0


def say(text: str) -> None:
    """A line on standard error, past Python's buffers, whose locks another thread may hold."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{text}\n".encode(errors="replace"))


def leave(status: int) -> int:
    """`status`, for a process whose files and groups are closed.

    A thread that still writes an abandoned checkpoint would abort the interpreter's own end, which would tell another
    status; then this does not return.
    """
    if any(thread.name == WRITER_THREAD for thread in threading.enumerate()):
        end_now(status)
    return status


def end_now(status: int) -> NoReturn:
    """End this process with `status` from any thread, without waiting for anything, and its helpers with it."""
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(_FLUSH_SECONDS)
    # A library's helper processes; nothing else would end them.
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def started_at(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's ticks; None if it is over (or a zombie)."""
    try:
        # The second field is the name in brackets, which may hold blanks.
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]


def age(pid: int) -> float:
    """Seconds since a process of this machine started; 0 if it is over."""
    ticks = started_at(pid)
    if ticks is None:
        return 0.0
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK"))


def runs_since(pid: int, started: str) -> bool | None:
    """Whether a process of this machine that started then still runs; None where the system hides it.

    /proc mounted with hidepid shows nobody the processes of other users.
    """
    foreign = False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        foreign = True
    try:
        now = started_at(pid)
    except PermissionError:
        return None
    return None if foreign and now is None else now == started


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is stopped (SIGSTOP, a debugger)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "Tt"
    except (FileNotFoundError, ProcessLookupError):
        return False
