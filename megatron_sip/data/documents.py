"""The corpus: documents of tokens from one or more IndexedDataset prefixes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_sip.data.indexed import IndexedFile, open_indexed
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import DataError
from megatron_sip.types import TokenArray

_SCAN_CHUNK = 1 << 22
_FULL_SCAN_TOKENS = 1 << 28
_SAMPLED_BLOCKS = 4096
_HASHED_BLOCKS, _HASHED_BYTES = 64, 1 << 16


def sidecar_path(prefix: str) -> Path:
    """The small JSON file in which tools/preprocess_data.py says with which tokenizer a corpus was made."""
    return Path(f"{prefix}.json")


class Corpus:
    """Documents of several prefixes, one after another. A trailing end-of-document token is not part of them."""

    def __init__(self, prefixes: Sequence[str], eod: int) -> None:
        if not prefixes:
            raise DataError("no corpus; give --data-path PREFIX, made by tools/preprocess_data.py")
        self._files = [open_indexed(prefix) for prefix in prefixes]
        self._eod = eod
        self._first = np.concatenate([[0], np.cumsum([len(file.starts) for file in self._files])])

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The prefixes as they were given."""
        return tuple(file.prefix for file in self._files)

    @property
    def eod(self) -> int:
        """The token that ends documents."""
        return self._eod

    @property
    def num_documents(self) -> int:
        """Documents of all prefixes, empty ones included."""
        return int(self._first[-1])

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[num_documents]` tokens of each document without its trailing EOD."""
        return np.concatenate([self._lengths_of(file) for file in self._files])

    def _lengths_of(self, file: IndexedFile) -> npt.NDArray[np.int64]:
        lengths = file.lengths.copy()
        filled = np.flatnonzero(lengths)
        last = file.tokens[file.starts[filled] + lengths[filled] - 1]
        lengths[filled] -= last == self._eod
        return lengths

    def _place(self, document: int) -> tuple[IndexedFile, int]:
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents}")
        which = int(np.searchsorted(self._first, document, side="right")) - 1
        return self._files[which], document - int(self._first[which])

    def length(self, document: int) -> int:
        """Tokens of one document without its trailing EOD."""
        file, local = self._place(document)
        start, length = int(file.starts[local]), int(file.lengths[local])
        return length - int(length > 0 and int(file.tokens[start + length - 1]) == self._eod)

    def tokens(self, document: int, start: int, stop: int) -> TokenArray:
        """`[stop - start]` int64 tokens of a document.

        Raises:
            IndexError: the range is not inside the document.
        """
        file, local = self._place(document)
        if not 0 <= start <= stop <= int(file.lengths[local]):
            raise IndexError(f"tokens {start} to {stop} of document {document} with {file.lengths[local]} tokens")
        begin = int(file.starts[local])
        return np.asarray(file.tokens[begin + start : begin + stop]).astype(np.int64)

    def fingerprint(self) -> str:
        """sha256 over the sizes and evenly spread blocks of every file: cheap at any size, and moves with the files."""
        digest = hashlib.sha256(str(self._eod).encode())
        for prefix in self.prefixes:
            for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
                _hash_file(path, digest)
        return digest.hexdigest()

    def check_vocabulary(self, vocab_size: int, tokenizer_name: str) -> None:
        """Refuse token ids beyond the vocabulary and EOD inside documents.

        Every token up to 2^28 of them per prefix; of larger files, blocks spread evenly.

        Raises:
            DataError: corpus and tokenizer disagree.
        """
        for file in self._files:
            for start, block in _blocks(file.tokens):
                highest, lowest = int(block.max()), int(block.min())
                if lowest < 0 or highest >= vocab_size:
                    raise DataError(
                        f"--data-path {file.prefix} holds token id {lowest if lowest < 0 else highest}, but "
                        f"--tokenizer-model {tokenizer_name} has ids 0 to {vocab_size - 1}: they do not belong "
                        "together; make the corpus again with this tokenizer, or name the one that it was made with"
                    )
                self._check_inner_eod(file, start + np.flatnonzero(block == self._eod))

    @staticmethod
    def _check_inner_eod(file: IndexedFile, places: npt.NDArray[np.int64]) -> None:
        ends = file.starts + file.lengths
        found = np.searchsorted(ends, places, side="right")
        inner = np.flatnonzero(places != ends[found] - 1)
        if len(inner):
            raise DataError(inner_eod_message(file.prefix, int(found[inner[0]])))


def inner_eod_message(prefix: str, document: int) -> str:
    """What to say of an end-of-document token that does not stand at the end."""
    return (
        f"--data-path {prefix}: document {document} holds end-of-document inside; the corpus was made without "
        "splitting special tokens, or several documents were joined: make it again with tools/preprocess_data.py"
    )


def _blocks(tokens: npt.NDArray[np.integer]) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
    """(start, block) over all tokens, or over blocks spread evenly when there are too many."""
    if len(tokens) <= _FULL_SCAN_TOKENS:
        for start in range(0, len(tokens), _SCAN_CHUNK):
            yield start, np.asarray(tokens[start : start + _SCAN_CHUNK])
        return
    size = _FULL_SCAN_TOKENS // (4 * _SAMPLED_BLOCKS)
    for start in np.linspace(0, len(tokens) - size, _SAMPLED_BLOCKS).astype(np.int64):
        yield int(start), np.asarray(tokens[start : start + size])


def _hash_file(path: Path, digest: hashlib._Hash) -> None:
    size = path.stat().st_size
    digest.update(f"{path.suffix}{size}".encode())
    with path.open("rb") as stream:
        for start in sorted({int(at) for at in np.linspace(0, max(0, size - _HASHED_BYTES), _HASHED_BLOCKS)}):
            stream.seek(start)
            digest.update(stream.read(_HASHED_BYTES))


def open_corpus(prefixes: Sequence[str], tokenizer: Tokenizer) -> Corpus:
    """Open a corpus and check that it was made with this tokenizer.

    Raises:
        DataError: see `open_indexed` and `Corpus.check_vocabulary`; or the corpus names another tokenizer.
    """
    corpus = Corpus(prefixes, tokenizer.eod)
    for prefix in corpus.prefixes:
        _check_sidecar(prefix, tokenizer)
    corpus.check_vocabulary(tokenizer.vocab_size, tokenizer.path)
    return corpus


def _check_sidecar(prefix: str, tokenizer: Tokenizer) -> None:
    """A corpus made by Megatron's own tool has no such file, which is no fault."""
    path = sidecar_path(prefix)
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); make the corpus again with tools/preprocess_data.py") from error
    made_with = said.get("tokenizer") if isinstance(said, dict) else None
    if made_with is not None and made_with != tokenizer.fingerprint():
        raise DataError(
            f"--data-path {prefix} was made with another tokenizer than --tokenizer-model {tokenizer.path}; make the "
            f"corpus again with this one, or name the other (vocabulary of {said.get('vocab_size')} tokens)"
        )
