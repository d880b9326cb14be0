"""Text files into a tokenised corpus: what tools/preprocess_data.py does."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_sip.data.documents import sidecar_path
from megatron_sip.data.indexed import IndexedWriter, smallest_dtype
from megatron_sip.data.sources import Document, TextUnit, expand_inputs, read_documents
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import DataError

_CHUNK_DOCUMENTS, _CHUNK_CHARACTERS = 256, 1 << 20

Chunk: TypeAlias = list[Document]
Encoded: TypeAlias = dict[str, list[npt.NDArray[np.integer]]]


@dataclass(frozen=True)
class CorpusReport:
    """What was written for one key. Empty documents are left out."""

    prefix: str
    documents: int
    empty: int
    tokens: int


def preprocess(
    inputs: Sequence[str],
    output_prefix: str,
    tokenizer_model: str,
    keys: Sequence[str] = ("text",),
    workers: int = 1,
    append_eod: bool = True,
    text_unit: TextUnit = "block",
    log_interval: int = 1000,
) -> list[CorpusReport]:
    """Tokenise `inputs` into one corpus per key, and say what was written.

    Raises:
        DataError: input, tokenizer or output that cannot be used; nothing is left under the output names.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if workers < 1:
        raise DataError(f"--workers {workers} must be at least 1")
    if len(set(keys)) != len(keys) or not keys:
        raise DataError(f"--json-keys {' '.join(keys)}: give at least one key, and each once")
    paths = expand_inputs(inputs)
    tokenizer = Tokenizer(tokenizer_model)
    dtype = smallest_dtype(tokenizer.vocab_size)
    prefixes = {key: f"{output_prefix}_{key}_document" for key in keys}
    _check_output(prefixes.values())
    empty = dict.fromkeys(keys, 0)
    with ExitStack() as stack:
        report = stack.enter_context(_Report(paths, log_interval))
        writers = {key: stack.enter_context(IndexedWriter(prefix, dtype)) for key, prefix in prefixes.items()}
        chunks = _chunks(paths, keys, text_unit, report.at)
        encode = _Encoder(tokenizer, dtype)
        for encoded in _encoded(chunks, encode, workers):
            for key, documents in encoded.items():
                for tokens in documents:
                    if len(tokens) == 0:
                        empty[key] += 1
                        continue
                    writers[key].add(np.append(tokens, tokenizer.eod) if append_eod else tokens)
            report.count(len(encoded[keys[0]]))
        for key, writer in writers.items():
            if writer.num_documents == 0:
                raise DataError(
                    f"--input {' '.join(inputs)}: no text under the key '{key}' ({empty[key]} empty documents); "
                    "give files that hold documents"
                )
        reports = [CorpusReport(prefixes[key], w.num_documents, empty[key], w.num_tokens) for key, w in writers.items()]
        # An old note must not stand beside new files.
        for prefix in prefixes.values():
            sidecar_path(prefix).unlink(missing_ok=True)
    for made in reports:
        _write_sidecar(made, tokenizer, append_eod)
    return reports


def _check_output(prefixes: Iterable[str]) -> None:
    for prefix in prefixes:
        folder = Path(prefix).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--output-prefix {prefix}: {folder} cannot be made ({error.strerror})") from error
        if not os.access(folder, os.W_OK):
            raise DataError(f"--output-prefix {prefix}: {folder} cannot be written; name another folder")


def _write_sidecar(made: CorpusReport, tokenizer: Tokenizer, append_eod: bool) -> None:
    path = sidecar_path(made.prefix)
    note = {
        "tokenizer": tokenizer.fingerprint(),
        "vocab_size": tokenizer.vocab_size,
        "documents": made.documents,
        "tokens": made.tokens,
        "append_eod": append_eod,
    }
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(json.dumps(note) + "\n")
    scratch.replace(path)


class _Report:
    """A progress bar over the bytes of all inputs on a terminal, a line every so many documents elsewhere."""

    def __init__(self, paths: Sequence[Path], interval: int) -> None:
        self._sizes = {path: path.stat().st_size for path in paths}
        self._done, self._documents, self._interval = 0, 0, max(1, interval)
        self._start = time.monotonic()

    def __enter__(self) -> _Report:
        total = sum(self._sizes.values())
        self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def at(self, path: Path, position: int) -> None:
        """`position` bytes of `path` were read; -1 when all were."""
        before = self._done
        self._bar.update(before + (self._sizes[path] if position < 0 else position) - self._bar.n)
        if position < 0:
            self._done += self._sizes[path]

    def count(self, documents: int) -> None:
        """`documents` more were tokenised."""
        before, self._documents = self._documents, self._documents + documents
        if self._bar.disable and self._documents // self._interval > before // self._interval:
            rate = self._documents / max(1e-9, time.monotonic() - self._start)
            print(f"tokenised {self._documents} documents ({rate:.0f}/s)", file=sys.stderr, flush=True)


def _chunks(
    paths: Sequence[Path], keys: Sequence[str], unit: TextUnit, at: Callable[[Path, int], None]
) -> Iterator[Chunk]:
    """Documents in lots that are worth a call to the tokenizer."""
    chunk: Chunk = []
    characters = 0
    for path in paths:

        def here(position: int, path: Path = path) -> None:
            at(path, position)

        for document in read_documents(path, keys, unit, here):
            chunk.append(document)
            characters += sum(map(len, document.values()))
            if len(chunk) >= _CHUNK_DOCUMENTS or characters >= _CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        at(path, -1)
    if chunk:
        yield chunk


class _Encoder:
    """Tokenises a chunk; goes to worker processes by the tokenizer's path."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self.path, self.dtype = tokenizer, tokenizer.path, dtype

    def __call__(self, chunk: Chunk) -> Encoded:
        return {
            key: [
                np.asarray(ids, dtype=self.dtype) for ids in self._tokenizer.encode_batch([doc[key] for doc in chunk])
            ]
            for key in chunk[0]
        }

    def __reduce__(self) -> tuple[object, ...]:
        return _open_encoder, (self.path, self.dtype.str)


def _open_encoder(path: str, dtype: str) -> _Encoder:
    return _Encoder(Tokenizer(path), np.dtype(dtype))


class _Worker:
    """One encoder per worker process, made by `start`."""

    encoder: _Encoder | None = None

    @classmethod
    def start(cls, encoder: _Encoder) -> None:
        """Called once in each process."""
        cls.encoder = encoder

    @classmethod
    def encode(cls, chunk: Chunk) -> Encoded:
        """Tokenise one chunk in this process."""
        if cls.encoder is None:
            raise RuntimeError("the worker was not started")
        return cls.encoder(chunk)


def _encoded(chunks: Iterator[Chunk], encode: _Encoder, workers: int) -> Iterator[Encoded]:
    """The chunks tokenised, in order; at most four per worker wait, so memory stays bounded."""
    if workers == 1:
        yield from map(encode, chunks)
        return
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[Encoded]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_Worker.start, initargs=(encode,)) as pool:
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_Worker.encode, chunk))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                f"--workers {workers}: a tokenising process died, most likely for want of memory; use fewer workers"
            ) from error
        finally:
            for future in waiting:
                future.cancel()
