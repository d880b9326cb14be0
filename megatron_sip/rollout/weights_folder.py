"""The folder through which a policy's weights reach its rollout servers: one subfolder a push, gone when it is passed.

Nothing here is durable: after a crash the weights come from a checkpoint, and what was left here is removed.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import uuid
from pathlib import Path

from megatron_sip.errors import CheckpointError

_NAME = "sip-rollout-weights"
_MEMORY = Path("/dev/shm")


class WeightsFolder:
    """A folder of this process below `parent`; None: in memory where the system has such a folder.

    Raises:
        CheckpointError: it cannot be made.
    """

    def __init__(self, parent: str | None) -> None:
        self._parent = Path(parent) if parent is not None else _default_parent()
        home = re.sub(r"[^\w.]", "_", socket.gethostname())
        self._prefix = f"{_NAME}-{home}-"
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            self._own = self._parent / f"{self._prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}"
            # In a folder that all users share nobody else may read them.
            self._own.mkdir(mode=0o777 if parent is not None else 0o700)
        except OSError as error:
            raise CheckpointError(
                f"--rollout-weights-dir {self._parent} cannot be written ({error.strerror or error}); name another"
            ) from error
        self._kept: list[Path] = []

    def next(self, version: str) -> Path:
        """Where the weights of this name go; the folder does not exist yet."""
        self._kept.append(self._own / version)
        return self._kept[-1]

    def only_last(self) -> None:
        """Remove all but the newest weights, which a server that was restarted may need again."""
        for folder in self._kept[:-1]:
            shutil.rmtree(folder, ignore_errors=True)
        self._kept = self._kept[-1:]

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._own, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        """What processes of this machine left that were killed."""
        for folder in self._parent.glob(f"{self._prefix}*-*"):
            pid = folder.name.removeprefix(self._prefix).partition("-")[0]
            if pid.isdigit() and not _runs(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)


def _default_parent() -> Path:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _runs(pid: int) -> bool:
    """Whether a process of this machine has this number, perhaps another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
