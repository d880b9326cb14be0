"""Writing a distributed checkpoint of tensors that come into being one at a time.

The format is that of torch's own writer, and its planner interface is what asks for each item. Only the loop over
the items is ours: torch's keeps the last tensor of every name until the file is closed, which with an embedding and
an LM head of gigabytes is more than streaming may hold.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_sip.checkpoint.latest import first_line
from megatron_sip.errors import CheckpointError

MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Piece:
    """A box of a stored tensor, and how to get it.

    name     of the whole tensor, whose shape is `whole`
    offset   of the box in it; `size` is its shape
    resolve  makes the box when its turn to be written has come
    """

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    resolve: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def index(self) -> MetadataIndex:
        """What torch calls the box by."""
        return MetadataIndex(self.name, torch.Size(self.offset))


def write_distributed(
    folder: Path,
    pieces: Sequence[Piece],
    objects: Mapping[str, Callable[[], io.BytesIO]],
    written: Callable[[int], None],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Write `.metadata` and the `.distcp` files into `folder`.

    objects         what is not a tensor, already serialised, by name
    written         hears of the bytes of each piece when it is on its way to the disk
    max_file_bytes  a file is closed before it grows beyond this, unless one piece alone does

    Raises:
        CheckpointError: the disk refuses.
        ValueError: the pieces of a tensor do not fill it, or disagree about it.
    """
    _require_whole(pieces)
    planner, writer = _Planner(pieces, objects), _Writer(folder, written, max_file_bytes)
    writer.set_up_storage_writer(True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([plan])
    (plan,) = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


def _require_whole(pieces: Sequence[Piece]) -> None:
    """Refuse a plan with a hole: what nobody wrote would be read as garbage."""
    seen: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    filled: dict[str, int] = {}
    for piece in pieces:
        if seen.setdefault(piece.name, (piece.whole, piece.dtype)) != (piece.whole, piece.dtype):
            raise ValueError(f"two pieces of {piece.name} disagree about its shape or type")
        filled[piece.name] = filled.get(piece.name, 0) + math.prod(piece.size)
    for name, (whole, _) in seen.items():
        if filled[name] != math.prod(whole):
            raise ValueError(f"the pieces of {name} hold {filled[name]} of its {math.prod(whole)} values")


class _Planner(SavePlanner):
    """Answers torch's questions from the list of pieces."""

    def __init__(self, pieces: Sequence[Piece], objects: Mapping[str, Callable[[], io.BytesIO]]) -> None:
        self._pieces = {piece.index: piece for piece in pieces}
        self._objects = objects

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        """Nothing: the pieces are all there is."""

    def create_local_plan(self) -> SavePlan:
        """Every object, then every piece, in the order given."""
        items = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in self._objects]
        for index, piece in self._pieces.items():
            chunk = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.size))
            data = TensorWriteData(chunk, TensorProperties(piece.dtype), torch.Size(piece.whole))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """torch's default."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The data of one item, made now."""
        if write_item.type == WriteItemType.BYTE_IO:
            return self._objects[write_item.index.fqn]()
        piece = self._pieces[write_item.index]
        tensor = piece.resolve()
        if tuple(tensor.shape) != piece.size or tensor.dtype != piece.dtype:
            raise ValueError(f"{piece.name} at {piece.offset} is {tuple(tensor.shape)} {tensor.dtype}, not {piece}")
        return tensor


class _Writer(FileSystemWriter):
    """torch's writer with a loop that holds one item at a time."""

    def __init__(self, folder: Path, written: Callable[[int], None], max_file_bytes: int) -> None:
        super().__init__(folder, overwrite=False)
        self._written, self._max_file_bytes = written, max_file_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write file after file, item after item, and flush each file to the disk."""
        results = []
        for number, items in enumerate(self._files(plan.items)):
            name = f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}"
            with (self.path / name).open("xb") as stream:
                for item in items:
                    results.append(self._write_item(stream, name, item, planner))
                    self._written(_nbytes(item))
                stream.flush()
                os.fsync(stream.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _files(self, items: Sequence[WriteItem]) -> Iterator[list[WriteItem]]:
        """Runs of items, each for a file."""
        run: list[WriteItem] = []
        room = self._max_file_bytes
        for item in items:
            if run and _nbytes(item) > room:
                yield run
                run, room = [], self._max_file_bytes
            run.append(item)
            room -= _nbytes(item)
        yield run

    def _write_item(self, stream: Any, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
        data, start = planner.resolve_data(item), stream.tell()
        if isinstance(data, io.BytesIO):
            stream.write(data.getbuffer())
        else:
            if data.untyped_storage().nbytes() != data.nbytes:
                data = data.clone()  # torch.save would write all that a view looks at
            try:
                torch.save(data, stream)
            except RuntimeError as error:  # its writer turns what the disk says into one
                raise CheckpointError(f"cannot write {self.path / name}: {first_line(error)}; free space") from error
        length = stream.tell() - start
        return WriteResult(item.index, length, _StorageInfo(name, start, length))


def _nbytes(item: WriteItem) -> int:
    """Bytes of an item's tensor; an object counts as nothing."""
    data = item.tensor_data
    if data is None or data.chunk is None:
        return 0
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize
