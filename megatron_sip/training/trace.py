"""`--profile`: a trace of a few steps on a few ranks, by torch's profiler.

A rank that records leaves two files: a Chrome trace, for Perfetto, chrome://tracing or TensorBoard, and a text with the
seconds of the parts and the operations that took longest. Neither shapes nor call stacks nor memory are recorded: they
multiply the size of a trace and slow the step down that is looked at.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import profile

from megatron_sip.config.groups import Config, LoggingConfig
from megatron_sip.config.validate_profile import profile_folder
from megatron_sip.errors import ConfigError
from megatron_sip.metrics.jsonl import set_aside
from megatron_sip.parallel.regions import region
from megatron_sip.training.trace_table import read_spans, summary


@dataclass(frozen=True)
class Window:
    """The iterations that are traced, `first` to `last`, counted from 1 as in the log line."""

    first: int
    last: int

    @classmethod
    def from_config(cls, logging: LoggingConfig) -> Window:
        """As in Megatron the flags count the iterations that are done: START before the window, END in its end."""
        return cls(logging.profile_step_start + 1, logging.profile_step_end)

    def holds(self, iteration: int) -> bool:
        """Whether `iteration` is traced."""
        return self.first <= iteration <= self.last


class StepTracer:
    """Records the window once. Every rank makes the same calls; those that do not record do nothing in them."""

    def __init__(self, config: Config, rank: int) -> None:
        logging = config.logging
        self._window = Window.from_config(logging) if logging.profile else None
        self._records = logging.profile and rank in logging.profile_ranks
        self._rank = rank
        self._folder = profile_folder(config)
        self._profiler: profile | None = None
        self._seen: list[int] = []

    def prepare(self, done: int) -> None:
        """Make the folder, unless the run goes on behind the window, with so many iterations `done`.

        Raises:
            ConfigError: it cannot be made.
        """
        if self._records and self._folder and self._window and done < self._window.last:
            with _complaining(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Around an iteration, counted from 1, with its save."""
        # A run that goes back to a checkpoint before the window has its trace already, or has left it unfinished.
        if self._records and self._window and self._window.holds(number) and (self._profiler or not self._seen):
            self._begin(number)
        with region(f"iteration {number}"):
            yield

    def due(self, number: int) -> bool:
        """Whether `write` is to be called behind this iteration; the same on all ranks."""
        return self._window is not None and number == self._window.last

    def write(self) -> None:
        """End the recording, if there is one, and write what it holds. It meets no other rank.

        Raises:
            ConfigError: the folder cannot be written.
        """
        profiler, self._profiler = self._profiler, None
        if profiler is None or self._folder is None:
            return
        profiler.stop()
        first, last = self._seen[0], self._seen[-1]
        what = f"iterations {first} to {last} on rank {self._rank}"
        with _complaining(self._folder):
            trace = _write(profiler, self._folder, f"rank_{self._rank}.iterations_{first}_{last}", what)
        print(f"> trace of {what} written to {trace}", flush=True)

    def _begin(self, number: int) -> None:
        if self._profiler is None:
            self._profiler = profile()  # the CPU, and the GPU where there is one
            self._profiler.start()
        self._seen.append(number)


def _write(profiler: profile, folder: Path, name: str, what: str) -> Path:
    """The trace, packed (unpacked it is ten times as large, and goes through the same folder), and its tables."""
    trace, tables, plain = (folder / f"{name}{end}" for end in (".pt.trace.json.gz", ".txt", ".json.part"))
    try:
        profiler.export_chrome_trace(str(plain))
        with _whole(trace) as part, plain.open("rb") as source, gzip.open(part, "wb", compresslevel=5) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        with _whole(tables) as part:
            part.write_text(f"{what}\n\n{summary(read_spans(plain))}")
    finally:
        plain.unlink(missing_ok=True)
    return trace


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """The file under another name until it is whole; a file of an earlier run is set aside."""
    part = path.with_name(path.name + ".part")
    yield part
    if path.exists():
        set_aside(path)
    os.replace(part, path)


@contextmanager
def _complaining(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write a trace to {folder} ({error.strerror}); give another folder with --profile-dir"
        ) from error
