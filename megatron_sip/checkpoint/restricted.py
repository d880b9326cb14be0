"""Reading a checkpoint that may come from anybody: its pickles name a few known classes, or they are refused.

torch reads `.metadata` and every item of bytes with the plain pickle module, which runs whatever a file names.
Here `.metadata` goes through an unpickler that makes the objects of torch's distributed checkpoint and does nothing
else (`metadata_pickle`), and all other pickles go through torch's weights-only unpickler. What was checked is what is
used: the reader keeps the metadata that it read, and an item of bytes is handed on as it was checked, written anew.

megatron-core is not needed here, so that small tools read as safely as a run does.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from megatron_sip.checkpoint.metadata_pickle import ForbiddenError, MetadataUnpickler
from megatron_sip.errors import CheckpointError

METADATA = ".metadata"
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError, LookupError, TypeError, ValueError),
    *(RuntimeError, RecursionError, MemoryError, OverflowError, struct.error),
)


class UnsafeFileError(CheckpointError):
    """A file that would run code, or reach out of its folder, if it were read without care."""


class UnreadableFileError(CheckpointError):
    """A file that is damaged, or no file of a checkpoint."""


def _refuse(source: str, name: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{source} names {name}, which no checkpoint needs; reading it could run a program, so nothing of it was "
        "read. Take the checkpoint from where you trust it"
    )


def read_metadata(folder: Path) -> Metadata:
    """The `.metadata` of a checkpoint folder.

    Raises:
        UnsafeFileError: it names what no checkpoint needs, or a file outside the folder.
        UnreadableFileError: it is missing or damaged.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = MetadataUnpickler(stream).load()
    except ForbiddenError as error:
        raise _refuse(str(path), str(error)) from error
    except OSError as error:
        raise UnreadableFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except _UNPICKLING_ERRORS as error:
        raise UnreadableFileError(f"{path} is damaged: {error}") from error
    _check_metadata(metadata, path)
    return metadata


def _check_metadata(metadata: Any, path: Path) -> None:
    """The kinds of all that the readers of torch and megatron-core take from it, and where it points."""
    sound = isinstance(metadata, Metadata) and isinstance(getattr(metadata, "state_dict_metadata", None), dict)
    sound = sound and isinstance(getattr(metadata, "storage_data", None), dict)
    sound = sound and all(
        isinstance(name, str) and isinstance(entry, TensorStorageMetadata | BytesStorageMetadata)
        for name, entry in metadata.state_dict_metadata.items()
    )
    if not sound:
        raise UnreadableFileError(f"{path} is damaged: it does not describe a checkpoint")
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise UnreadableFileError(f"{path} is damaged: it does not say where its tensors lie")
        file, numbers = info.relative_path, (info.offset, info.length)
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise UnreadableFileError(f"{path} is damaged: it places an item at {numbers} of {file}")
        if not isinstance(file, str) or file in ("", ".", "..") or "\0" in file or Path(file).name != file:
            raise UnsafeFileError(
                f"{path} places a tensor in {file!r}, which is no file of its folder; nothing of it was read. Take the "
                "checkpoint from where you trust it"
            )


def described_sizes(metadata: Metadata) -> dict[str, int]:
    """Every data file that checked metadata points to, with the bytes that it must have at least."""
    sizes: dict[str, int] = {}
    for info in metadata.storage_data.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    return sizes


def load_pickled(file: Path | IO[bytes], source: str) -> Any:
    """What `torch.save` wrote, by torch's weights-only unpickler: tensors and plain values.

    Raises:
        UnsafeFileError: it names a class or function beyond those.
        UnreadableFileError: it is missing or damaged.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UnreadableFileError(f"{source} cannot be read: {error.strerror or error}") from error
    except _UNPICKLING_ERRORS as error:
        # The weights-only unpickler tells what it refuses in its message alone.
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _refuse(source, named[1]) from error
        cause = str(error).split("WeightsUnpickler error: ")[-1].strip() or type(error).__name__
        raise UnreadableFileError(f"{source} is damaged: {cause.splitlines()[0]}") from error


class RestrictedReader(FileSystemReader):
    """torch's reader of a checkpoint folder with checked metadata, which are read once."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._metadata = read_metadata(folder)
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> Metadata:
        """The metadata as they were checked when the reader was made."""
        return self._metadata


class RestrictedBytes(DefaultLoadPlanner):
    """Mixed into a load planner: items of bytes come through the weights-only unpickler.

    The metadata decide which items are bytes, so this is needed also where only tensors are wanted.
    """

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Check an item and hand on what it holds, never the bytes that came."""
        name = read_item.dest_index.fqn
        held = load_pickled(value, f"the item {name} of the checkpoint")
        _refuse_inner_pickle(name, held)
        checked = io.BytesIO()
        torch.save(held, checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def _refuse_inner_pickle(name: str, held: Any) -> None:
    """Transformer Engine unpickles the bytes that the extra state of its layers holds, so there must be none.

    Its layers keep such state in FP8 training alone, which this product does not do.
    """
    if "_extra_state" not in name:
        return
    for part in held if isinstance(held, list) else [held]:
        if isinstance(part, torch.Tensor) and part.numel() == 0:
            continue
        if isinstance(part, io.BytesIO) and not part.getbuffer().nbytes:
            continue
        if part is not None:
            raise UnsafeFileError(
                f"the item {name} of the checkpoint holds state of FP8 training, which Transformer Engine would read "
                "as a program; convert the checkpoint to one without FP8"
            )
