"""The persistent cache: answers that depend on the document alone, kept over steps, epochs and runs.

One SQLite file in the folder of --judge-cache, which several processes and several runs share. SQLite is part of
Python, and its locks hold between processes; its rollback journal is used, not its write-ahead log, whose shared
memory works on one host only. Values are JSON with a checksum over name and value: nothing in the file is ever run, and
what is damaged is absent, not wrong.

The cache only saves calls. What cannot be used at the start is an error; what fails later is one warning, and the run
goes on without it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from megatron_sip.errors import ConfigError
from megatron_sip.services.cache_names import Name, decode, encode

T = TypeVar("T")
logger = logging.getLogger(__name__)

FILE = "judge-cache.sqlite3"
APPLICATION = 0x53495043
VERSION = 1
TABLE = "CREATE TABLE answers (name BLOB PRIMARY KEY, value BLOB NOT NULL, sum BLOB NOT NULL, used INTEGER NOT NULL)"
INDEX = "CREATE INDEX by_use ON answers (used)"
BUSY_SECONDS = 20.0
TOUCH_SECONDS = 3600
"""A use is noted to the hour, so that reading hardly ever writes."""
AT_ONCE = 500
FEWEST_EVICTED, MOST_EVICTED = 64, 4096
"""Answers that one statement deletes: few where room for a round is made, many where the bound was lowered."""
LONGEST_VALUE = 4_000_000


class AnswerCache:
    """The cache in one folder, bounded to about `bound_bytes`. One thread of its own touches the file.

    The least recently used answers leave first. Of two processes that store different answers to one question the first
    wins. `damaged` counts answers that were dropped because their checksum did not fit; `works` is False once the cache
    is off.
    """

    def __init__(self, folder: Path, bound_bytes: int, clock: Callable[[], float] = time.time) -> None:
        """Open the file, or make it.

        Raises:
            ConfigError: the folder or the file cannot be used.
        """
        self.path = folder / FILE
        self.damaged = 0
        self._bound = bound_bytes
        self._clock = clock
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sip-cache")
        try:
            self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown()
            raise

    @property
    def works(self) -> bool:
        """Whether anything is kept and found."""
        return self._connection is not None

    async def lookup(self, names: Sequence[Name]) -> dict[Name, float | str]:
        """The values of those names that are there and whole; names that do not belong on disk are passed over."""
        wanted = list({name for name in names if name.on_disk})
        return await self._run(lambda connection: self._lookup(connection, wanted), {}) if wanted else {}

    async def store(self, answers: Sequence[tuple[Name, float | str]]) -> None:
        """Keep these answers; those whose names do not belong on disk are passed over."""
        kept = [(name, value) for name, value in answers if name.on_disk]
        if kept:
            await self._run(lambda connection: self._store(connection, kept), None)

    def close(self) -> None:
        """Close the file and end the thread; a second call does nothing."""
        if self.works:
            self._thread.submit(self._drop).result()
        self._thread.shutdown()

    async def _run(self, action: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        if not self.works:
            return otherwise
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._guarded, action, otherwise)

    # What follows runs in the thread.

    def _guarded(self, action: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """`action`, or `otherwise` and no cache from now on where the file fails."""
        if self._connection is None:
            return otherwise
        try:
            return action(self._connection)
        except sqlite3.Error as error:
            logger.warning(
                "%s failed (%s); the run goes on without the cache of --judge-cache. Free space, or delete a damaged "
                "file before the next start",
                self.path,
                error,
            )
            self._drop()
            return otherwise

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self) -> None:
        connection = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            _guard_against_the_file(connection)
            with _Writing(connection):
                _make_or_check(connection, self.path)
                self._evict(connection)
            connection.executescript("PRAGMA incremental_vacuum")  # execute() would stop after one page
        except (OSError, sqlite3.Error) as error:
            if connection is not None:
                connection.close()
            raise ConfigError(
                f"--judge-cache: {self.path} cannot be used ({error}); name a folder that can be written, delete the "
                "file if it is damaged, or leave the flag out"
            ) from error
        except BaseException:
            if connection is not None:
                connection.close()
            raise
        self._connection = connection

    def _lookup(self, connection: sqlite3.Connection, names: Sequence[Name]) -> dict[Name, float | str]:
        found: dict[Name, float | str] = {}
        damaged: list[tuple[bytes]] = []
        stale: list[tuple[int, bytes]] = []
        now = int(self._clock())
        by_digest = {name.digest: name for name in names}
        digests = list(by_digest)
        for start in range(0, len(digests), AT_ONCE):
            part = digests[start : start + AT_ONCE]
            marks = ",".join("?" * len(part))
            rows = connection.execute(f"SELECT name, value, sum, used FROM answers WHERE name IN ({marks})", part)
            for digest, value, check, used in rows:
                name = by_digest[digest]
                try:
                    found[name] = decode(name, value, check)
                except ValueError:
                    damaged.append((digest,))
                    continue
                if not isinstance(used, int) or now - used > TOUCH_SECONDS:
                    stale.append((now, digest))
        if damaged or stale:
            with _Writing(connection):
                connection.executemany("DELETE FROM answers WHERE name = ?", damaged)
                connection.executemany("UPDATE answers SET used = ? WHERE name = ?", stale)
        self._tell_damage(len(damaged))
        return found

    def _tell_damage(self, count: int) -> None:
        if count and not self.damaged:
            logger.warning("%s holds damaged answers; they are dropped and asked anew", self.path)
        self.damaged += count

    def _store(self, connection: sqlite3.Connection, answers: Sequence[tuple[Name, float | str]]) -> None:
        now = int(self._clock())
        rows = [(name.digest, *encode(name, value), now) for name, value in answers]
        with _Writing(connection):
            connection.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", rows)
            self._evict(connection)

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Delete the least recently used answers until the pages in use are within the bound."""
        oldest = "DELETE FROM answers WHERE name IN (SELECT name FROM answers ORDER BY used LIMIT ?)"
        count = FEWEST_EVICTED
        while _bytes_in_use(connection) > self._bound:
            if connection.execute(oldest, (count,)).rowcount < 1:
                break
            count = min(2 * count, MOST_EVICTED)


class _Writing:
    """A transaction that may write from its start, so that no other process can come between its parts."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._connection.execute("COMMIT")
        elif self._connection.in_transaction:
            self._connection.execute("ROLLBACK")


def _guard_against_the_file(connection: sqlite3.Connection) -> None:
    """Settings of this connection: whoever wrote the file shall not make us run or allocate anything."""
    connection.text_factory = bytes
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_VALUE)
    for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
        connection.execute(f"PRAGMA {pragma}")
    # Only counts while the file is empty; it lets a file shrink to a smaller bound.
    connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = TRUNCATE").fetchall()
    connection.execute("PRAGMA synchronous = NORMAL")


def _make_or_check(connection: sqlite3.Connection, path: Path) -> None:
    """Make the table in an empty file, or see that the file is one of ours. ConfigError where it is not."""
    [application] = connection.execute("PRAGMA application_id").fetchone()
    [version] = connection.execute("PRAGMA user_version").fetchone()
    made = {row[0] for row in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
    if not (application or version or made):
        for statement in (TABLE, INDEX, f"PRAGMA application_id = {APPLICATION}", f"PRAGMA user_version = {VERSION}"):
            connection.execute(statement)
    elif application != APPLICATION or version < 1 or (version == VERSION and made != {TABLE.encode(), INDEX.encode()}):
        raise ConfigError(f"--judge-cache: {path} is no cache of megatron_sip; name another folder")
    elif version != VERSION:
        raise ConfigError(
            f"--judge-cache: {path} is of format {version}, written by another megatron_sip (this one knows "
            f"{VERSION}); name another folder, or delete the file"
        )


def _bytes_in_use(connection: sqlite3.Connection) -> int:
    """Bytes of the pages that hold something; pages that became free are used again before the file grows."""
    count, free, size = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (int(count) - int(free)) * int(size)
