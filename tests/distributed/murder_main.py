"""The product's entry, whose ranks write on a board where they stand: `torchrun murder_main.py BOARD FLAG...`

Files of the journal that the product deletes, since no kept checkpoint needs them, stay in `journal` beside BOARD: a
run that begins from nothing needs them all.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from marks import BACKWARD, Board

from megatron_sip import pretrain


class Marker:
    """Marks the stages of this rank; it sets methods of the product, so a process has one."""

    def __init__(self, board: Board, kept: Path) -> None:
        self.board, self.rank, self.kept = board, int(os.environ["RANK"]), kept
        self._save_began = 0

    def hook(self) -> None:
        """Mark the watched stages, the backward pass of each micro-batch, and saves from their call to the name."""
        from megatron.core.pipeline_parallel import schedules

        from megatron_sip.checkpoint.writer import CheckpointWriter
        from megatron_sip.parallel.watch import StageWatch
        from megatron_sip.services import journal

        watched, backward = StageWatch.stage, schedules.backward_step

        @contextmanager
        def stage(watch: StageWatch, name: str, iteration: int | None = None, samples: Any = None) -> Iterator[None]:
            with self.board.stage(self.rank, name, iteration), watched(watch, name, iteration, samples):
                yield

        def backward_step(*positional: Any, **named: Any) -> Any:
            with self.board.stage(self.rank, BACKWARD, None):
                return backward(*positional, **named)

        StageWatch.stage = stage  # type: ignore[method-assign]
        schedules.backward_step = backward_step
        save = CheckpointWriter.save
        CheckpointWriter.save = self._beginning(save)  # type: ignore[method-assign]
        for name in ("poll", "finish"):
            setattr(CheckpointWriter, name, self._ending(getattr(CheckpointWriter, name)))
        deleted = journal._delete
        journal._delete = lambda path: deleted(_kept(path, self.kept))
        self.board.enter(self.rank)

    def _beginning(self, save: Callable[..., None]) -> Callable[..., None]:
        def marked(writer: Any, trainer: Any, progress: Any) -> None:
            writer.finish()  # the one before, so that its end is not taken for that of this one
            self._save_began = self.board.begin_save(self.rank, progress.iteration)
            save(writer, trainer, progress)

        return marked

    def _ending(self, method: Callable[..., Path | None]) -> Callable[..., Path | None]:
        def marked(writer: Any) -> Path | None:
            named = method(writer)
            if named is not None and self.board.read(self.rank).saving % 2:
                self.board.end_save(self.rank, self._save_began)
            return named

        return marked


def _kept(path: Path, folder: Path) -> Path:
    """The same path, whose content has a second name in `folder` now."""
    folder.mkdir(exist_ok=True)
    with suppress(FileExistsError):  # killed between here and the deletion
        # Names come again, files do not.
        os.link(path, folder / f"{path.stat().st_ino}-{path.name}")
    return path


def run(argv: Sequence[str]) -> int:
    """Train as `python -m megatron_sip.pretrain FLAG...` would; `argv` is BOARD FLAG..."""
    board = Path(argv[0])
    Marker(Board(board, int(os.environ["WORLD_SIZE"])), board.with_name("journal")).hook()
    return pretrain.main(list(argv[1:]))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
