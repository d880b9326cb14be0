"""Documents of text out of files: JSONL, Parquet and plain text, each also compressed as .gz or .zst."""

from __future__ import annotations

import glob
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast

from megatron_sip.data.utf8 import has_half_character
from megatron_sip.errors import DataError

Document: TypeAlias = dict[str, str]
Progress: TypeAlias = Callable[[int], None]
TextUnit = Literal["block", "file"]

_FORMATS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".zst")
_CHUNK = 1 << 18
PLAIN_TEXT_KEY = "text"


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """The files that names and globs stand for, in sorted order within a glob, each once.

    Raises:
        DataError: a pattern that matches nothing, a folder, or a file of unknown format.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DataError(f"--input {pattern}: no such file; give existing files, or a quoted glob that matches some")
        for match in matches:
            path = Path(match)
            if path.is_dir():
                raise DataError(f"--input {match} is a folder; give its files, such as '{match}/*.jsonl'")
            file_format(path)
            found[path] = None
    return list(found)


def file_format(path: Path) -> str:
    """`jsonl`, `parquet` or `text`, from the name without .gz or .zst.

    Raises:
        DataError: another ending.
    """
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    kind = _FORMATS.get(suffixes[-1].lower()) if suffixes else None
    if kind is None:
        raise DataError(
            f"--input {path}: the name does not say what it holds; it must end in one of {', '.join(_FORMATS)}, "
            "with .gz or .zst behind it if compressed"
        )
    return kind


def read_documents(path: Path, keys: Sequence[str], text_unit: TextUnit, progress: Progress) -> Iterator[Document]:
    """The documents of one file, each with the text of every key.

    `progress` is told how many bytes of the file (as it lies on disk) were read so far.

    Raises:
        DataError: damaged compression, bad UTF-8, a bad JSON line or an absent key, with file and line.
    """
    kind = file_format(path)
    if kind == "text" and list(keys) != [PLAIN_TEXT_KEY]:
        raise DataError(f"--json-keys {' '.join(keys)}: {path} is plain text, whose only key is '{PLAIN_TEXT_KEY}'")
    try:
        with path.open("rb") as raw, _decompressed(raw, path) as stream:
            if kind == "parquet":
                yield from _parquet(stream, path, keys, progress)
            elif kind == "jsonl":
                yield from _jsonl(_watched_lines(stream, raw, progress), path, keys)
            else:
                yield from _plain(_watched_lines(stream, raw, progress), path, text_unit)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"--input {path} is damaged or cut short ({error}); fetch it again") from error


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw, mode="rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw, path), _CHUNK)
    return raw


class _ZstdReader(io.RawIOBase):
    """Reads .zst, frame after frame. Unlike the library's own reader it notices a file that was cut short."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        import zstandard

        self._raw, self._path = raw, path
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._raw.read(_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is not complete")
                return 0
            self._ready = self._feed(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _feed(self, chunk: bytes) -> bytes:
        parts = []
        try:
            while chunk:
                if self._frame is None:
                    self._frame = self._new()
                parts.append(self._frame.decompress(chunk))
                chunk = b""
                if self._frame.eof:
                    chunk, self._frame = self._frame.unused_data, None
        except self._error as error:
            raise EOFError(str(error)) from error
        return b"".join(parts)


def _watched_lines(stream: IO[bytes], raw: IO[bytes], progress: Progress) -> Iterator[bytes]:
    """Lines as bytes; the position is told once in a while."""
    for number, line in enumerate(stream):
        yield line
        if number % 64 == 0:
            progress(raw.tell())
    progress(raw.tell())


def _text(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"--input {path} line {number} is not UTF-8 (byte {error.start} of the line); convert the file to UTF-8"
        ) from error


def _jsonl(lines: Iterator[bytes], path: Path, keys: Sequence[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        text = _text(line, path, number)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # the second: brackets in brackets without end
            raise DataError(
                f"--input {path} line {number} is not JSON ({error}); each line must be one object: mend or remove it"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"--input {path} line {number} is a JSON {type(record).__name__}, not an object; mend it")
        yield {key: _value(record, key, f"{path} line {number}") for key in keys}


def _value(record: dict[str, Any], key: str, place: str) -> str:
    if key not in record:
        names = ", ".join(list(record)[:10]) or "none"
        raise DataError(f"--json-keys {key}: {place} has no such key; its keys are {names}")
    value = record[key]
    if not isinstance(value, str):
        raise DataError(f"--json-keys {key}: {place} holds {type(value).__name__}, not text; mend or remove it")
    if has_half_character(value):
        raise DataError(f"--json-keys {key}: {place} holds half a character (a lone surrogate); mend or remove it")
    return value


def _plain(lines: Iterator[bytes], path: Path, unit: TextUnit) -> Iterator[Document]:
    """A document for each block of lines between blank lines, or one for the whole file."""
    block: list[str] = []
    for number, line in enumerate(lines, start=1):
        text = _text(line, path, number)
        if unit == "block" and not text.strip():
            if block:
                yield {PLAIN_TEXT_KEY: "".join(block).rstrip("\r\n")}
            block = []
            continue
        block.append(text)
    if block:
        yield {PLAIN_TEXT_KEY: "".join(block).rstrip("\r\n") if unit == "block" else "".join(block)}


def _parquet(stream: IO[bytes], path: Path, keys: Sequence[str], progress: Progress) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = path.stat().st_size
    with tempfile.TemporaryFile() as seekable:
        source: IO[bytes] = stream
        if path.suffix in _COMPRESSED:
            # Parquet is read from its end, which a compressed stream cannot do.
            shutil.copyfileobj(stream, seekable)
            seekable.seek(0)
            source = seekable
        try:
            table = pq.ParquetFile(source)
            names = table.schema_arrow.names
            for key in keys:
                if key not in names:
                    raise DataError(f"--json-keys {key}: {path} has no such column; its columns are {', '.join(names)}")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=list(keys)):
                for record in batch.to_pylist():
                    row += 1
                    yield {key: _value(record, key, f"{path} row {row}") for key in keys}
                progress(size * row // max(1, table.metadata.num_rows))
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise DataError(f"--input {path} cannot be read as Parquet ({reason}); fetch or make it again") from error
