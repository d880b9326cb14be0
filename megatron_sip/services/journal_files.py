"""The files of a journal: segments that are appended to, scanned at a start, and deleted when nobody needs them.

    <save>/journal/000003-0001-000002.jsonl      launch 3, leader 1, segment 2

A launch never writes into the files of an earlier one, so a line that a kill cut off stays the last of its file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megatron_sip.errors import CheckpointError
from megatron_sip.services.journal_records import Head, encode_end, read_head

_NAME = re.compile(r"(\d{6,})-(\d{4,})-(\d{6,})\.jsonl")
_LAST_LINE = 256
NOTHING = -1
"""The greatest sample of a segment without answers."""


class Segment(NamedTuple):
    """One file. The fields before `path` order the files of a folder by the time they were begun, launch by launch."""

    launch: int
    leader: int
    number: int
    path: Path


class Place(NamedTuple):
    """Where a line of answers stands."""

    segment: Segment
    offset: int
    length: int
    kind: str
    answers: int


class Voiding(NamedTuple):
    """All that was written before it, of `first_sample` and later ones, is void."""

    segment: Segment
    first_sample: int


@dataclass
class Scan:
    """What a segment holds.

    found         lines of answers by sample, and voids, in the order of the file; only samples that were asked for
    last_sample   the greatest sample of all its answers, NOTHING without any
    voids         how many voids it holds
    torn          whether it ends in a line that was cut off
    damaged       numbers of unreadable lines in its midst, counted from 1
    """

    segment: Segment
    found: list[tuple[int, Place] | Voiding] = field(default_factory=list)
    last_sample: int = NOTHING
    voids: int = 0
    torn: bool = False
    damaged: tuple[int, ...] = ()


def segments_of(folder: Path) -> list[Segment]:
    """The segments in `folder` in their order; none where it is not there.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = sorted(os.listdir(folder)) if folder.exists() else []
    except OSError as error:
        raise CheckpointError(f"cannot read the journal {folder} ({error.strerror}); make it readable") from error
    matches = [(_NAME.fullmatch(name), name) for name in names]
    return sorted(
        Segment(int(found[1]), int(found[2]), int(found[3]), folder / name) for found, name in matches if found
    )


def scan(segment: Segment, position: int) -> Scan:
    """Read a segment for the answers on samples from `position` on.

    A closed segment that ends before `position` is not read, but for its last line. Unreadable lines at the end are
    the work of a kill; others are damage.

    Raises:
        CheckpointError: the file cannot be read, or is of a newer format.
    """
    result, unreadable, offset, good = Scan(segment), [], 0, 0
    try:
        with segment.path.open("rb") as file:
            closed = _closing(file.fileno())
            if closed is not None and closed.sample < position and closed.count == 0:
                return Scan(segment, last_sample=closed.sample)
            for number, line in enumerate(file, start=1):
                if _take(result, line, offset, position):
                    good = number
                else:
                    unreadable.append(number)
                offset += len(line)
    except FileNotFoundError:  # deleted since the folder was listed: nobody needs it
        return Scan(segment)
    except OSError as error:
        raise CheckpointError(
            f"cannot read the journal {segment.path} ({error.strerror}); mend or remove it"
        ) from error
    result.torn = any(number > good for number in unreadable)
    result.damaged = tuple(number for number in unreadable if number < good)
    return result


def _closing(handle: int) -> Head | None:
    """The last line of a closed segment; None for one that was not closed."""
    size = os.fstat(handle).st_size
    start = max(0, size - _LAST_LINE)
    line = os.pread(handle, size - start, start).rstrip(b"\n").rpartition(b"\n")[2] + b"\n"
    head = read_head(line)
    return head if head is not None and head.kind == "end" else None


def _take(result: Scan, line: bytes, offset: int, position: int) -> bool:
    """Add a line to what was found; False if it is unreadable."""
    head = read_head(line)
    if head is None:
        return False
    if head.kind == "void":
        result.voids += 1
        result.found.append(Voiding(result.segment, head.sample))
    elif head.kind != "end":
        result.last_sample = max(result.last_sample, head.sample)
        if head.sample >= position:
            result.found.append((head.sample, Place(result.segment, offset, len(line), head.kind, head.count)))
    return True


def places_of(folders: Sequence[Sequence[Scan]]) -> dict[int, list[Place]]:
    """Where the answers on each sample stand, the oldest first, without those that are void.

    `folders` are the scans of one folder or several, the older folder first, each in the order of its segments. A void
    holds for older folders, earlier launches and its own leader: of what other leaders of its launch wrote nobody knows
    whether it was before.
    """
    places: dict[int, list[Place]] = {}
    for scans in folders:
        for one in scans:
            for item in one.found:
                if isinstance(item, Voiding):
                    for sample in [sample for sample in places if sample >= item.first_sample]:
                        places[sample] = [place for place in places[sample] if _beside(place.segment, one.segment)]
                else:
                    places.setdefault(item[0], []).append(item[1])
    return {sample: found for sample, found in places.items() if found}


def _beside(one: Segment, other: Segment) -> bool:
    """Whether two segments are of different leaders of one launch."""
    return one.path.parent == other.path.parent and one.launch == other.launch and one.leader != other.leader


class SegmentWriter:
    """Appends to one new segment; every append is on disk when it returns."""

    def __init__(self, folder: Path, launch: int, leader: int, number: int) -> None:
        """Make the file, and the folder where needed.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.last_sample, self.voids = NOTHING, 0
        path = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = {segment.number for segment in segments_of(folder) if segment[:2] == (launch, leader)}
            number = max([number, *(other + 1 for other in taken)])
            path = folder / f"{launch:06d}-{leader:04d}-{number:06d}.jsonl"
            self._handle: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            for place in (folder, folder.parent):
                _fsync_folder(place)
        except OSError as error:
            raise _refused(path, error) from error
        self.segment = Segment(launch, leader, number, path)

    @property
    def broken(self) -> bool:
        """Whether nothing can be appended any more."""
        return self._handle is None

    def append(self, lines: Sequence[bytes], last_sample: int = NOTHING, voids: int = 0) -> None:
        """Write whole lines and wait until they are on disk. `last_sample` and `voids` describe them.

        Raises:
            CheckpointError: the disk refuses; nothing more is written to this segment.
        """
        if self._handle is None:
            raise ValueError(f"{self.segment.path} is closed")
        data = memoryview(b"".join(lines))
        try:
            while data:
                data = data[os.write(self._handle, data) :]
            os.fsync(self._handle)
        except OSError as error:
            self._drop()
            raise _refused(self.segment.path, error) from error
        self.last_sample = max(self.last_sample, last_sample)
        self.voids += voids

    def close(self) -> None:
        """Write the last line and close; a second call does nothing."""
        if self._handle is not None:
            self.append([encode_end(self.last_sample, self.voids)])
            self._drop()

    def _drop(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _refused(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot write the journal {path} ({error.strerror}); free space or choose another --save. No verdict is used "
        "that is not written down"
    )


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
