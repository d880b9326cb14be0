"""What a whole checkpoint consists of, so that a damaged one is recognised before anything of it is loaded.

`manifest.json`, the last file that a save writes before the folder gets its name:

    {"format_version": 1, "iteration": 20, "written": 1795000000.0,
     "files": {"__0_0.distcp": {"bytes": 1024, "crc32": "0badcafe"}, ...}}

Sizes tell a file that was cut short, checksums one whose bytes changed. A checkpoint of a version that wrote no
manifest is checked by what its `.metadata` says.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sip.checkpoint.restricted import METADATA, UnreadableFileError, described_sizes, read_metadata
from megatron_sip.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
COMMON = "common.pt"
RUN_CONFIG = "run_config.yaml"
BACKENDS = "metadata.json"
"""megatron-core's own note of its format."""

_OWN = (METADATA, COMMON, BACKENDS, RUN_CONFIG)
"""Files that every checkpoint has, besides its data."""
_CHUNK = 8 << 20
_NAMED = re.compile(r"iter_(\d+)")


class DamagedError(Exception):
    """A checkpoint is not whole; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint. `crc32` is None where it is not known (no manifest)."""

    size: int
    crc32: int | None


@dataclass(frozen=True)
class Manifest:
    """The files of one checkpoint by name; `written` in seconds since 1970, 0 where it is not known."""

    format_version: int
    iteration: int
    files: dict[str, FileEntry]
    written: float = 0.0


def file_entry(path: Path, on_progress: Callable[[], None] = lambda: None) -> FileEntry:
    """Size and checksum of a file by reading it; `on_progress` is called behind each 8 MiB."""
    crc, size, buffer = 0, 0, bytearray(_CHUNK)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            crc, size = zlib.crc32(memoryview(buffer)[:count], crc), size + count
            on_progress()
    return FileEntry(size, crc)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into the folder and flush it to disk."""
    files = {
        name: {"bytes": entry.size, "crc32": None if entry.crc32 is None else f"{entry.crc32:08x}"}
        for name, entry in sorted(manifest.files.items())
    }
    described = {
        "format_version": manifest.format_version,
        "iteration": manifest.iteration,
        "written": manifest.written,
        "files": files,
    }
    write_durably(folder / MANIFEST, f"{json.dumps(described, indent=1)}\n".encode())


def write_durably(path: Path, data: bytes) -> FileEntry:
    """Write a small file and flush it to disk; its entry in a manifest."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileEntry(len(data), zlib.crc32(data))


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder; without the file, one made from what `.metadata` describes.

    Raises:
        DamagedError: it cannot be read, or it names no files.
        UnsafeFileError: there is no manifest, and `.metadata` is no lawful one.
        CheckpointError: a newer version wrote it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return _described(folder)
    try:
        raw = json.loads(path.read_bytes())
        version = raw["format_version"]
        require_known_version(folder, version)
        files = {str(name): _entry(name, entry) for name, entry in raw["files"].items()}
        return Manifest(version, int(raw["iteration"]), files, float(raw["written"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error


def _entry(name: str, raw: dict[str, Any]) -> FileEntry:
    if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is no file of the folder")
    return FileEntry(int(raw["bytes"]), int(raw["crc32"], 16))


def _described(folder: Path) -> Manifest:
    """The files that a checkpoint without a manifest must have; their sizes are the least that they may be."""
    missing = [name for name in _OWN if not (folder / name).is_file()]
    if missing:
        raise DamagedError(f"{missing[0]} is missing")
    try:
        data = described_sizes(read_metadata(folder))
    except UnreadableFileError as error:
        raise DamagedError(str(error)) from error
    whole = {name: FileEntry(1, None) for name in _OWN}
    return Manifest(FORMAT_VERSION, 0, whole | {name: FileEntry(size, None) for name, size in data.items()})


def require_known_version(folder: Path, version: object) -> None:
    """Refuse a format of later days before anything else of it is looked at.

    Raises:
        CheckpointError: a newer version of megatron_sip wrote it.
    """
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {version} of a newer megatron_sip (this one knows {FORMAT_VERSION}); upgrade, or "
            "name another checkpoint"
        )


def listed(folder: Path) -> Manifest:
    """Cheap check of a checkpoint: its manifest, if every file is there with its size.

    Raises:
        DamagedError: naming the first file that is not.
        CheckpointError: as `read_manifest`.
    """
    if not folder.is_dir():
        raise DamagedError("the folder is missing")
    manifest = read_manifest(folder)
    _require_its_own(folder, manifest)
    for name, entry in sorted(manifest.files.items()):
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{name} is missing ({error.strerror})") from error
        if size < entry.size or (entry.crc32 is not None and size != entry.size):
            raise DamagedError(f"{name} has {size} bytes where it should have {entry.size}")
    return manifest


def _require_its_own(folder: Path, manifest: Manifest) -> None:
    """A manifest that leaves files out, or of another checkpoint, would let anything pass for whole.

    Raises:
        DamagedError: naming what does not agree.
    """
    for name in _OWN:
        if name not in manifest.files:
            raise DamagedError(f"{MANIFEST} does not list {name}")
    named = _NAMED.fullmatch(folder.name)
    # Without the file, nothing but the name tells the iteration.
    if (folder / MANIFEST).is_file() and named and int(named[1]) != manifest.iteration:
        raise DamagedError(f"{MANIFEST} is that of iteration {manifest.iteration}")


def require_bytes(
    folder: Path, manifest: Manifest, names: Iterable[str], on_progress: Callable[[], None] = lambda: None
) -> None:
    """Thorough check: every named file has its checksum. It reads all of them; `on_progress` as of `file_entry`.

    Raises:
        DamagedError: naming the first file that has not, or cannot be read.
    """
    for name in names:
        expected = manifest.files[name]
        if expected.crc32 is None:
            continue
        try:
            found = file_entry(folder / name, on_progress)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from error
        if found != expected:
            raise DamagedError(f"{name} has changed since it was written (its checksum differs)")


def share(manifest: Manifest, rank: int, size: int) -> Iterator[str]:
    """The files that one of `size` ranks checks: about the same number of bytes each."""
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    loads = [0] * size
    for name in by_size:
        lightest = loads.index(min(loads))
        loads[lightest] += manifest.files[name].size
        if lightest == rank:
            yield name
