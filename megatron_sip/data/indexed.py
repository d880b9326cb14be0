"""Megatron's IndexedDataset files: `PREFIX.bin` (tokens) and `PREFIX.idx` (lengths, offsets, documents).

The .idx file, little endian: magic (9 bytes), version u64 = 1, dtype code u8, S = number of sequences u64,
D = number of document bounds u64, lengths int32 [S], byte offsets int64 [S], document bounds int64 [D]
(in sequences, first 0, last S), and, for multimodal data only, modes int8 [S].
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from megatron_sip.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, npt.DTypeLike] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_REMAKE = "make the corpus again with tools/preprocess_data.py, or copy both files again from where they are whole"


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The token type that Megatron chooses for a vocabulary."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class IndexedFile:
    """One opened .bin/.idx pair. `starts` and `lengths` are `[num_documents]`, in tokens."""

    prefix: str
    tokens: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


def open_indexed(prefix: str) -> IndexedFile:
    """Open and validate `prefix`.bin and `prefix`.idx.

    Raises:
        DataError: a file is missing, empty, truncated, of another kind, or the two do not belong together.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise DataError(
                f"--data-path {prefix}: {path} does not exist; give the prefix of a corpus made by "
                "tools/preprocess_data.py, without .bin or .idx"
            )
    dtype, lengths, offsets, bounds = _read_index(idx_path)
    size = bin_path.stat().st_size
    _check_against_bin(idx_path, bin_path, dtype, lengths, offsets, size)
    if len(bounds) < 2 or size == 0:
        raise DataError(f"--data-path {prefix}: the corpus is empty; check what went into tools/preprocess_data.py")
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return IndexedFile(
        prefix=str(prefix),
        tokens=np.memmap(bin_path, dtype=dtype, mode="r"),
        starts=ends[bounds[:-1]],
        lengths=np.diff(ends[bounds]),
    )


def _read_index(path: Path) -> tuple[np.dtype, npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if head[:9] != MAGIC[: len(head[:9])] or not head:
        raise DataError(f"{path} is not an index of Megatron's IndexedDataset (bad magic); {_REMAKE}")
    if len(head) < _HEADER.size:
        raise DataError(f"{path} is truncated ({size} bytes); {_REMAKE}")
    _, version, code, sequences, bounds = _HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{path} has version {version}, only version 1 can be read; {_REMAKE}")
    if code not in _DTYPES:
        raise DataError(f"{path} holds tokens of type code {code}, which is no integer type; {_REMAKE}")
    whole = _HEADER.size + 12 * sequences + 8 * bounds
    if size < whole:
        raise DataError(f"{path} is truncated: {size} of {whole} bytes; {_REMAKE}")
    if size not in (whole, whole + sequences):
        raise DataError(f"{path} is damaged: {size} bytes where its header says {whole}; {_REMAKE}")
    data = np.memmap(path, mode="r")
    at = _HEADER.size
    lengths = np.frombuffer(data, np.int32, sequences, at)
    offsets = np.frombuffer(data, np.int64, sequences, at + 4 * sequences)
    limits = np.frombuffer(data, np.int64, bounds, at + 12 * sequences)
    sound = bounds > 0 and limits[0] == 0 and limits[-1] == sequences and bool((limits[1:] >= limits[:-1]).all())
    if not sound:
        raise DataError(f"{path} is damaged: its document bounds do not cover its sequences; {_REMAKE}")
    return np.dtype(_DTYPES[code]), lengths, offsets, limits


def _check_against_bin(
    idx_path: Path,
    bin_path: Path,
    dtype: np.dtype,
    lengths: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    size: int,
) -> None:
    """The sequences must follow one another without gaps and fill the .bin file."""
    if bool((lengths < 0).any()):
        raise DataError(f"{idx_path} is damaged: it holds negative lengths; {_REMAKE}")
    held, longest = size // dtype.itemsize, int(lengths.max(initial=0))
    if longest > held:  # and sums of what passes here stay far below 2**63
        raise DataError(
            f"{bin_path} is truncated or {idx_path} damaged: a sequence of {longest} tokens, where the file holds "
            f"{held}; {_REMAKE}"
        )
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if not np.array_equal(offsets[1:], ends[:-1]) or (len(offsets) > 0 and offsets[0] != 0):
        raise DataError(f"{idx_path} is damaged: its offsets do not follow from its lengths; {_REMAKE}")
    expected = int(ends[-1]) if len(ends) else 0
    if size < expected:
        raise DataError(f"{bin_path} is truncated: {size} of the {expected} bytes that {idx_path} names; {_REMAKE}")
    if size > expected:
        raise DataError(f"{bin_path} has {size} bytes, {idx_path} names {expected}: not of one corpus; {_REMAKE}")


class IndexedWriter:
    """Writes a corpus under temporary names; `close` moves both files into place, an error removes them."""

    def __init__(self, prefix: str, dtype: np.dtype) -> None:
        self.prefix = prefix
        self._dtype = dtype
        self._code = next(code for code, kind in _DTYPES.items() if np.dtype(kind) == dtype)
        self._lengths: list[int] = []
        self._total = 0
        token = uuid.uuid4().hex[:8]
        self._bin, self._idx = Path(f"{prefix}.bin.{token}.tmp"), Path(f"{prefix}.idx.{token}.tmp")
        self._bin.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._bin.open("wb")

    @property
    def num_documents(self) -> int:
        """Documents written so far."""
        return len(self._lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens written so far."""
        return self._total

    def add(self, tokens: npt.ArrayLike) -> None:
        """Append one document, `[length]` token ids. DataError where the disk refuses them."""
        array = np.asarray(tokens).astype(self._dtype)
        try:
            self._stream.write(array.tobytes())
        except OSError as error:
            raise self._refused(error) from error
        self._lengths.append(len(array))
        self._total += len(array)

    def _refused(self, error: OSError) -> DataError:
        return DataError(
            f"--output-prefix {self.prefix} cannot be written ({error.strerror}); free space or name another folder"
        )

    def close(self) -> None:
        """Write the index and give both files their names. DataError, and nothing left, where the disk refuses them."""
        try:
            self._finish()
        except OSError as error:
            self.discard()
            raise self._refused(error) from error

    def _finish(self) -> None:
        self._sync(self._stream)
        lengths = np.asarray(self._lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        count = len(lengths)
        with self._idx.open("wb") as stream:
            stream.write(_HEADER.pack(MAGIC, 1, self._code, count, count + 1))
            stream.write(lengths.tobytes())
            stream.write(np.concatenate([[0], ends[:-1]]).astype(np.int64)[:count].tobytes())
            stream.write(np.arange(count + 1, dtype=np.int64).tobytes())
            self._sync(stream)
        # A reader must never pair a new .idx with an old .bin, so the .bin goes first; a crash in between is
        # seen by the size check.
        self._bin.replace(f"{self.prefix}.bin")
        self._idx.replace(f"{self.prefix}.idx")

    @staticmethod
    def _sync(stream) -> None:  # type: ignore[no-untyped-def]  # any binary file
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # of bytes that the full disk did not take and that nobody wants now
            self._stream.close()
        self._bin.unlink(missing_ok=True)
        self._idx.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
