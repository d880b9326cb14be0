"""JSONL files that survive crashes and resumes: one record a line, each with its `iteration`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from megatron_sip.errors import ConfigError, DataError


class JsonlWriter:
    """Appends records, each flushed as a whole line.

    On a resume (`start_iteration` > 0) the records beyond that iteration, and a line that a crash cut
    short, are dropped first, so that no iteration stands there twice. A fresh run never destroys the
    file of an earlier one: that is renamed to `<name>.1`, `.2` and so on.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        start_iteration: int = 0,
        flag: str,
        cut: Callable[[Path, int], object] | None = None,
        durable: bool = False,
    ) -> None:
        """Open `path` for append. ConfigError, naming `flag`, if it cannot be written.

        `cut(path, iteration)` takes out what lies beyond an iteration; default `drop_after`. `durable` records are on
        the disk when `write` returns; others survive the end of the process, not that of the machine.
        """
        self.path = Path(path)
        self._flag, self._cut, self._durable = flag, cut or drop_after, durable
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if start_iteration > 0:
                self._cut(self.path, start_iteration)
            elif self.path.exists() and self.path.stat().st_size > 0:
                set_aside(self.path)
            self._open()
        except OSError as error:
            raise ConfigError(f"cannot write {self.path} ({error.strerror}); give another path with {flag}") from error

    def rewind(self, iteration: int) -> None:
        """Take out the records beyond `iteration`, which the run makes again. ConfigError if the disk refuses it."""
        self.close()
        try:
            self._cut(self.path, iteration)
            self._open()
        except OSError as error:
            raise ConfigError(
                f"cannot write {self.path} ({error.strerror}); give another path with {self._flag}"
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record. ConfigError if the disk refuses it."""
        line = memoryview((json.dumps(_encode(record), ensure_ascii=False, allow_nan=False) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
            if self._durable:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._refused = True
            raise self._no_room(error) from error

    def close(self) -> None:
        """Flush to disk and close. ConfigError if the disk refuses it; not again what `write` was refused."""
        if self._file.closed:
            return
        try:
            with self._file:
                if not self._refused:
                    os.fsync(self._file.fileno())
        except OSError as error:
            raise self._no_room(error) from error

    def _open(self) -> None:
        # Without a buffer: a line that the disk refused must not come back at the end.
        self._file: FileIO = self.path.open("ab", buffering=0)
        self._refused = False

    def _no_room(self, error: OSError) -> ConfigError:
        return ConfigError(f"cannot write {self.path} ({error.strerror}); free some space or move it with {self._flag}")


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a last line that a crash cut short is left out, any other bad line is a DataError."""
    for _, record in _lines(Path(path)):
        yield record


def _lines(source: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each line without its end, and the record in it; one line is held at a time."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, start=1):
                record = _parse(line)
                if record is not None:
                    yield line.removesuffix(b"\n"), record
                elif line.endswith(b"\n"):
                    raise DataError(f"{source}, line {number} is not a JSON object; mend or remove that line")
    except OSError as error:
        raise DataError(f"cannot read {source}: {error.strerror}") from error


def drop_after(path: Path, iteration: int) -> int:
    """Rewrite `path` without the records whose `iteration` is greater; returns how many were dropped.

    The new file replaces the old one in one step. A missing file is left missing.
    """
    if not path.exists():
        return 0
    dropped = 0

    def kept() -> Iterator[bytes]:
        nonlocal dropped
        for line, record in _lines(path):
            if int(record["iteration"]) <= iteration:
                yield line
            else:
                dropped += 1

    _replace_lines(path, kept())
    return dropped


def replace_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Let `path` hold `records`, as `read_jsonl` gave them; the new file replaces the old one in one step."""
    _replace_lines(path, (json.dumps(record, ensure_ascii=False).encode() for record in records))


def _replace_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Let `path` hold `lines`, which may come from it; behind an error it is as it was."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as target:
            for line in lines:
                target.write(line + b"\n")
            target.flush()
            os.fsync(target.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def decode_number(value: object) -> float:
    """A metric as it was written: numbers, and `"NaN"`, `"Infinity"`, `"-Infinity"` for what JSON lacks."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise DataError(f"{value!r} is not a number")
    try:
        return float(value)
    except ValueError as error:
        raise DataError(f"{value!r} is not a number") from error


def _encode(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    if isinstance(value, str):
        # A lone surrogate cannot be written as UTF-8; it is shown as its escape.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def set_aside(path: Path) -> None:
    """Rename `path` to the first free of `<name>.1`, `.2` and so on."""
    number = 1
    while path.with_name(f"{path.name}.{number}").exists():
        number += 1
    path.rename(path.with_name(f"{path.name}.{number}"))
