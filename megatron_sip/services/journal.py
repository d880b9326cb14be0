"""The journal: every verdict, rewrite and Missing that training uses, on disk before it is used.

A live server answers the same question differently each time. What is in the journal is not asked again, so the steps
since a checkpoint repeat after a restart, or after a rollback in the same process. Each leader appends to files of its
own; what it looks up may come from any leader of any earlier launch, since another data parallel size gives its samples
to other leaders. Nothing but the places of the lines behind the checkpoint is held in memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from megatron_sip.errors import CheckpointError
from megatron_sip.services.journal_files import Place, Segment, SegmentWriter, places_of, scan, segments_of
from megatron_sip.services.journal_records import Entry, Key, Value, decode, encode, encode_void

T = TypeVar("T")
logger = logging.getLogger(__name__)
FOLDER = "journal"


@dataclass(frozen=True)
class Recalled:
    """What a scan found for the samples behind a position: how many answers, and what of the files was unreadable."""

    verdicts: int
    rewrites: int
    torn: int
    damaged: tuple[str, ...]


class _Closed(NamedTuple):
    """A segment that nobody appends to any more."""

    segment: Segment
    last_sample: int
    voids: int


class Journal:
    """The journal of one leader. One thread of its own touches the files; `lookup` and `append` await it.

    The other methods are for the main thread and wait for it. `recall` comes before the first `lookup`.
    """

    def __init__(self, folder: Path, leader: int, earlier: Path | None = None) -> None:
        """`folder` takes this run's segments; `earlier`, if given, is read before it and never written.

        Leader 0 deletes what earlier launches left behind.
        """
        self._folder, self._leader, self._earlier = folder, leader, earlier
        self._launch: int | None = None
        self._number = 0
        self._writer: SegmentWriter | None = None
        self._closed: list[_Closed] = []
        self._places: dict[int, list[Place]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sip-journal")
        self._ended = False

    def recall(self, position: int) -> Recalled:
        """Scan all segments, so that questions on samples from `position` on are answered from them.

        Raises:
            CheckpointError: a segment cannot be read, or is of a newer format.
        """
        return self._do(lambda: self._recall(position))

    async def lookup(self, keys: Sequence[Key]) -> dict[Key, Value]:
        """The values of those keys that the journal knows.

        What only the earlier folder knows is in the own one when this returns: a start from a checkpoint of this run
        reads that alone.

        Raises:
            CheckpointError: a segment has changed, or the disk refuses.
        """
        wanted = sorted({key.sample for key in keys} & self._places.keys())
        if not wanted:
            return {}
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._look_up, keys, wanted)

    async def append(self, entries: Sequence[Entry]) -> None:
        """Write down answers; they are on disk when this returns.

        Where it is cancelled they are written all the same, and nobody hears of a disk that refuses: they are asked
        for again then.

        Raises:
            CheckpointError: the disk refuses.
        """
        if entries:
            # What waits for the thread would be dropped by a cancellation: the hub ends its tasks a second time when
            # it closes, while they write down what they have.
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._append, entries))

    def void(self, first_sample: int) -> None:
        """Take back all that was written of `first_sample` and later ones, so that a restart asks anew.

        It holds for this leader's own segments and for all of earlier launches.

        Raises:
            CheckpointError: the disk refuses.
        """
        self._do(lambda: self._void(first_sample))

    def checkpointed(self, oldest_sample: int) -> None:
        """Delete segments that no kept checkpoint can need.

        `oldest_sample` is the first sample that the oldest of them has not trained.

        Raises:
            CheckpointError: the disk refuses.
        """
        self._do(lambda: self._prune(oldest_sample))

    def close(self) -> None:
        """Close the open segment and end the thread; a second call does nothing.

        The last line only spares the next start a scan, so a disk that refuses it takes nothing from the run.
        """
        if not self._ended:
            self._ended = True
            try:
                self._do(self._end_segment)
            except CheckpointError as error:
                logger.warning("the journal's last segment stays open: %s", error)
            finally:
                self._thread.shutdown()

    def _do(self, action: Callable[[], T]) -> T:
        return self._thread.submit(action).result()

    # What follows runs in the thread.

    def _recall(self, position: int) -> Recalled:
        folders = [folder for folder in (self._earlier, self._folder) if folder is not None]
        scans = [[scan(segment, position) for segment in segments_of(folder)] for folder in folders]
        if self._launch is None:
            own = scans[-1]
            self._launch = 1 + max((one.segment.launch for one in own), default=0)
            if self._leader == 0:
                self._closed = [_Closed(one.segment, one.last_sample, one.voids) for one in own]
        self._places = places_of(scans)
        found = [place for places in self._places.values() for place in places]
        everything = [one for group in scans for one in group]
        return Recalled(
            verdicts=sum(place.answers for place in found if place.kind == "verdicts"),
            rewrites=sum(place.answers for place in found if place.kind == "rewrites"),
            torn=sum(one.torn for one in everything),
            damaged=tuple(f"{one.segment.path}, line {line}" for one in everything for line in one.damaged),
        )

    def _look_up(self, keys: Sequence[Key], samples: Sequence[int]) -> dict[Key, Value]:
        known, own = self._read(samples)
        found = {key: known[key] for key in keys if key in known}
        copied = [(key, value) for key, value in found.items() if key not in own]
        if copied:
            self._append(copied)
        return found

    def _read(self, samples: Sequence[int]) -> tuple[dict[Key, Value], set[Key]]:
        """What is known of these samples, and which of it stands in the own folder."""
        known: dict[Key, Value] = {}
        own: set[Key] = set()
        handles: dict[Path, int] = {}
        try:
            for place in (place for sample in samples for place in self._places.get(sample, ())):
                path = place.segment.path
                if path not in handles:
                    handles[path] = os.open(path, os.O_RDONLY)
                answers = decode(os.pread(handles[path], place.length, place.offset))
                known.update(answers)
                if path.parent == self._folder:
                    own.update(key for key, _ in answers)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"the journal {path} changed while the run read it ({error}); start again") from error
        finally:
            for handle in handles.values():
                os.close(handle)
        return known, own

    def _append(self, entries: Sequence[Entry]) -> None:
        self._open_segment().append(encode(entries), last_sample=max(key.sample for key, _ in entries))

    def _void(self, first_sample: int) -> None:
        self._open_segment().append([encode_void(first_sample)], voids=1)
        self._places = {sample: places for sample, places in self._places.items() if sample < first_sample}

    def _prune(self, oldest_sample: int) -> None:
        self._end_segment()
        kept: list[_Closed] = []
        for one in sorted(self._closed):
            # A void must outlive what it takes back.
            if one.last_sample < oldest_sample and not (one.voids and kept):
                _delete(one.segment.path)
            else:
                kept.append(one)
        self._closed = kept
        self._places = {sample: places for sample, places in self._places.items() if sample >= oldest_sample}

    def _open_segment(self) -> SegmentWriter:
        if self._launch is None:
            raise RuntimeError("recall() comes first")
        if self._writer is not None and self._writer.broken:
            self._end_segment()
        if self._writer is None:
            self._writer = SegmentWriter(self._folder, self._launch, self._leader, self._number)
            self._number = self._writer.segment.number + 1
        return self._writer

    def _end_segment(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            self._closed.append(_Closed(writer.segment, writer.last_sample, writer.voids))
            writer.close()


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot delete {path} of the journal ({error.strerror}); check the rights") from error
