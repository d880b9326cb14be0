"""Where each rank stands, in a small file that another process reads while the rank runs.

A rank's row is one word for its process id, one for its stage, one for its saves, and one a stage for the time that its
last visit took. A word is written in one copy of eight bytes, so a reader sees an old word or a new one.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.config.timeouts import STAGES as WATCHED

BACKWARD = "backward"
"""Within "train", for every micro-batch; the other stages are those that the product watches itself."""
STAGES = ("", *WATCHED, BACKWARD)
_WORD = struct.Struct("<Q")
_PID, _STAGE, _SAVE, _SECONDS = 0, 1, 2, 3
_ROW = _WORD.size * (_SECONDS + len(STAGES))


@dataclass(frozen=True)
class Mark:
    """Where a rank stands.

    `visit` counts the stages that it has entered or come back to. `saving` is odd while a checkpoint is on its way,
    which with an asynchronous save may be in any stage; `saved` is the iteration of that save or of the one before.
    """

    pid: int
    stage: str
    iteration: int
    visit: int
    saving: int
    saved: int


class Board:
    """The file with the rows of all ranks."""

    def __init__(self, path: Path, ranks: int) -> None:
        """Open `path`, or make it; of ranks that do so at once all open the same, whole file."""
        if not path.exists():
            own = path.with_name(f"{path.name}.{os.getpid()}")
            own.write_bytes(bytes(_ROW * ranks))
            with suppress(FileExistsError):
                os.link(own, path)
            own.unlink()
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def read(self, rank: int) -> Mark:
        """Where `rank` stands, or stood when it died; pid 0 before it ever ran."""
        stage, save = self._get(rank, _STAGE), self._get(rank, _SAVE)
        place = (STAGES[stage & 0xFF], stage >> 8 & 0xFFFFFF, stage >> 32)
        return Mark(self._get(rank, _PID), *place, save & 0xFFFFFFFF, save >> 32)

    def usual_seconds(self, rank: int, stage: str) -> float:
        """What the last whole visit of the stage took, in "save" the last whole save; 0 before one."""
        return self._get(rank, _SECONDS + STAGES.index(stage)) / 1e9

    def enter(self, rank: int) -> None:
        """This process is `rank` from here on."""
        self._put(rank, _STAGE, 0)
        self._put(rank, _SAVE, 0)
        self._put(rank, _PID, os.getpid())

    @contextmanager
    def stage(self, rank: int, stage: str, iteration: int | None) -> Iterator[None]:
        """Stand in `stage` for a while, then where the rank stood before; without an iteration in that of before."""
        before, began = self.read(rank), time.monotonic_ns()
        self._mark(rank, stage, before.iteration if iteration is None else iteration)
        try:
            yield
        finally:
            if stage != "save":
                self._put(rank, _SECONDS + STAGES.index(stage), time.monotonic_ns() - began)
            self._mark(rank, before.stage, before.iteration if iteration is None else iteration)

    def begin_save(self, rank: int, iteration: int) -> int:
        """A checkpoint is on its way; the time of its beginning."""
        self._put(rank, _SAVE, iteration << 32 | (self.read(rank).saving | 1))
        return time.monotonic_ns()

    def end_save(self, rank: int, began: int) -> None:
        """The checkpoint has its name."""
        now = self.read(rank)
        self._put(rank, _SECONDS + STAGES.index("save"), time.monotonic_ns() - began)
        self._put(rank, _SAVE, now.saved << 32 | (now.saving + 1))

    def _mark(self, rank: int, stage: str, iteration: int) -> None:
        visit = (self._get(rank, _STAGE) >> 32) + 1
        self._put(rank, _STAGE, visit << 32 | iteration << 8 | STAGES.index(stage))

    def _get(self, rank: int, word: int) -> int:
        at = rank * _ROW + word * _WORD.size
        return int(_WORD.unpack(self._map[at : at + _WORD.size])[0])

    def _put(self, rank: int, word: int, value: int) -> None:
        at = rank * _ROW + word * _WORD.size
        self._map[at : at + _WORD.size] = _WORD.pack(value)
