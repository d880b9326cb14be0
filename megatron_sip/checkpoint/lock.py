"""One run at a time writes to the folder of `--save`.

`run.lock` there names the process of the main rank, which sets the file's time anew while it lives. Who finds the lock
of a process of its own machine asks the kernel whether it still runs. Of another machine, or where the kernel does not
tell, it watches the file: a time that stands still for `PATIENCE_SECONDS` by its own clock is that of a dead run, so no
two clocks are compared.

Only O_EXCL and rename decide, which hold on network file systems too. Who takes a lock over first makes a claim, a
file named after the content of the old lock: of two that found the same dead run, one alone renames its claim over the
lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.ending import runs_since
from megatron_sip.parallel.inquest import Home

LOCK = "run.lock"
REFRESH_SECONDS = 5.0
PATIENCE_SECONDS = 30.0
"""So long may a live run be kept from its file: a busy disk, a long call that holds Python's lock."""


class SaveLock:
    """The right of one process to write to a folder; `say` hears of a wait and of a lock that is taken over.

    Held until `release` or the end of the process. `root` None: no folder, and nothing is done.
    """

    def __init__(
        self,
        root: Path | None,
        say: Callable[[str], None],
        *,
        refresh_seconds: float = REFRESH_SECONDS,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._root, self._say = root, say
        self._refresh_seconds, self._patience_seconds = refresh_seconds, patience_seconds
        self._own = b""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def acquire(self) -> None:
        """Take the lock, from a dead run too.

        Raises:
            CheckpointError: a live run holds it, or nothing can be written there.
        """
        if self._root is None:
            return
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        text = json.dumps({"home": asdict(Home.here()), "since": since, "token": uuid.uuid4().hex})
        self._own = text.encode()
        file = self._root / LOCK
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            while not (_create(file, self._own) or _read(file) == self._own):
                self._take_over(file)
        except OSError as error:
            raise CheckpointError(
                f"cannot write to --save {self._root}: {error.strerror or error}; free space, mend its rights or name "
                "another"
            ) from error
        self._thread = threading.Thread(target=self._refresh, args=(file,), name="save-lock", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """Refuse to go on where another run took the lock, as it does from a process that stood still for long.

        Raises:
            CheckpointError: the lock is another's.
            OSError: it cannot be read.
        """
        if self._root is None or self._thread is None:
            return
        file = self._root / LOCK
        found = _read(file)
        if found is None and _create(file, self._own):  # somebody removed it
            return
        if found != self._own:
            raise CheckpointError(
                f"--save {self._root} was taken over by {_words(found or b'')} while this run stood still; it saves "
                "nothing more: end one of the two"
            )

    def release(self) -> None:
        """Let go of the folder, if this process holds it."""
        if self._root is None or self._thread is None:
            return
        self._ended.set()
        self._thread.join(self._refresh_seconds)
        self._thread = None
        with suppress(OSError):  # the disk is gone; whoever comes next finds a dead process
            if _read(self._root / LOCK) == self._own:
                (self._root / LOCK).unlink()

    def _refresh(self, file: Path) -> None:
        while not self._ended.wait(self._refresh_seconds):
            with suppress(OSError):  # a save will tell of a disk that is gone
                if _read(file) == self._own:
                    os.utime(file)

    def _take_over(self, file: Path) -> None:
        """Try to put the own lock in the place of a dead run's; the file tells whether that was done."""
        old = self._dead(file)
        if old is None:
            return
        claim = file.with_name(f"{LOCK}.{hashlib.sha256(old).hexdigest()[:16]}")
        if not _create(claim, self._own):
            if self._dead(claim) is not None:  # killed within the next few lines
                claim.unlink(missing_ok=True)
            return
        if _read(file) != old:
            claim.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):  # another heir took this claim for that of a dead one
            claim.replace(file)
            self._say(f"the lock {file} of {_words(old)}, which is over, is taken over")

    def _dead(self, file: Path) -> bytes | None:
        """The content of the lock of a run that is over; None where it changed meanwhile.

        Raises:
            CheckpointError: the run lives.
        """
        began, first = time.monotonic(), _look(file)
        if first is None:
            return None
        home = _home(first[0])
        if home is not None and home.started and home.machine == Home.here().machine:
            alive = runs_since(home.pid, home.started)
            if alive:
                raise self._held(first[0])
            if alive is False:
                return first[0]
        patience = self._patience_seconds
        self._say(f"{file} is held by {_words(first[0])}; looking for up to {patience:.0f} s whether it lives")
        while time.monotonic() - began < patience:
            time.sleep(min(0.5, patience / 10))
            now = _look(file)
            if now is None or now[0] != first[0]:
                return None
            if now != first:
                raise self._held(first[0])
        return first[0]

    def _held(self, lock: bytes) -> CheckpointError:
        return CheckpointError(
            f"--save {self._root} is in use by another run, {_words(lock)}; end that one, or name another --save"
        )


def _create(file: Path, content: bytes) -> bool:
    """Whether the file was made by this call."""
    try:
        stream = file.open("xb")
    except FileExistsError:
        return False
    try:
        with stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        file.unlink(missing_ok=True)  # a full disk leaves no lock without a name
        raise
    return True


def _look(file: Path) -> tuple[bytes, int] | None:
    """The file's content and the time of its last change in ns; None where it is not there."""
    try:
        # Opened anew each time: a network file system asks its server then.
        with file.open("rb") as stream:
            return stream.read(), os.fstat(stream.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _read(file: Path) -> bytes | None:
    found = _look(file)
    return None if found is None else found[0]


def _home(lock: bytes) -> Home | None:
    """The process that a lock names; None of one that was cut short."""
    try:
        return Home(**json.loads(lock)["home"])
    except (ValueError, TypeError, KeyError):
        return None


def _words(lock: bytes) -> str:
    home = _home(lock)
    return f"{home}, since {json.loads(lock)['since']}" if home else "a process that left no name"
