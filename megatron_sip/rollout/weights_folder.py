"""The folder through which a policy's weights reach its rollout servers: one subfolder a push, gone when it is passed.

Nothing here is durable: after a crash the weights come from a checkpoint, and what was left here is removed. Whose a
folder is, is written in it: runs in containers share folders, and process numbers mean different processes there.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path

from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.ending import runs_since
from megatron_sip.parallel.inquest import Home

_NAME = "sip-rollout-weights"
_OWNER = "owner.json"
_MEMORY = Path("/dev/shm")


class WeightsFolder:
    """A folder of this process below `parent`; None: in memory where the system has such a folder.

    Raises:
        CheckpointError: it cannot be made.
    """

    def __init__(self, parent: str | None) -> None:
        self._parent = Path(parent) if parent is not None else _default_parent()
        self._own = self._parent / f"{_NAME}-{uuid.uuid4().hex[:16]}"
        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            # In a folder that all users share nobody else may read them.
            self._own.mkdir(mode=0o777 if parent is not None else 0o700)
            (self._own / _OWNER).write_text(json.dumps(asdict(Home.here())) + "\n", encoding="utf-8")
        except OSError as error:
            self.close()
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
        for folder in self._parent.glob(f"{_NAME}-*"):
            if _is_left(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _default_parent() -> Path:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir())


def _is_left(folder: Path) -> bool:
    """Whether its process is over; not where that cannot be known from here."""
    try:
        home = Home(**json.loads((folder / _OWNER).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # of another user, or not written yet
        return False
    known = isinstance(home.pid, int) and bool(home.started) and home.machine == Home.here().machine
    return known and runs_since(home.pid, home.started) is False
