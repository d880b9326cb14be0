"""Parts of the tensors of a distributed checkpoint, read one after the other, in one process, without megatron-core.

torch's reader loads a stored chunk, copies what is wanted of it and lets it go, so that memory holds the wanted part
and at most two chunks.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sip.checkpoint.latest import first_line
from megatron_sip.checkpoint.restricted import RestrictedReader
from megatron_sip.errors import CheckpointError

_DAMAGE = (OSError, EOFError, KeyError, ValueError, RuntimeError, AssertionError, TypeError, AttributeError)


class StoredTensors:
    """What one checkpoint folder holds, by the names in its `.metadata`.

    Raises:
        CheckpointError: `.metadata` is missing or damaged, or would run code (see `restricted`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = RestrictedReader(folder)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self.objects: list[str] = []
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, BytesStorageMetadata):
                self.objects.append(name)
            else:
                self._tensors[name] = entry

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._tensors)

    def size(self, name: str) -> tuple[int, ...]:
        """Shape of a whole tensor; of a layer's, the layers come first."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor."""
        return self._tensors[name].properties.dtype

    def chunks(self, name: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and size of each stored part of a tensor."""
        return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._tensors[name].chunks]

    def read(
        self, name: str, offset: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A box of a tensor in memory of its own, in `dtype` (default the stored one).

        Raises:
            CheckpointError: a file is damaged, or no file holds a part of the box.
        """
        entry = self._tensors[name]
        box = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        with self._readable():
            items = create_read_items_for_chunk_list(name, entry, [box])
            held = sum(math.prod(item.lengths) for item in items)
            if held != math.prod(size):
                raise ValueError(f"only {held} of {math.prod(size)} values of {name} are there")
            target = torch.empty(size, dtype=dtype or entry.properties.dtype)
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def read_object(self, name: str) -> io.BytesIO:
        """The bytes of what is not a tensor, as they are."""
        index = MetadataIndex(name)
        nowhere = torch.Size((0,))
        sink = _Bytes()
        with self._readable():
            item = ReadItem(LoadItemType.BYTE_IO, index, nowhere, index, nowhere, nowhere)
            self._reader.read_data(LoadPlan([item]), sink).wait()
        return sink.content

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Tell what is damaged in the words of a CheckpointError."""
        try:
            yield
        except (*_DAMAGE, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{self.folder} cannot be read: {first_line(error)}; choose another --iteration"
            ) from error


class _Into(DefaultLoadPlanner):
    """Puts what is read where it belongs in one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing to do: the part is a view."""


class _Bytes(DefaultLoadPlanner):
    """Keeps the bytes of one object."""

    def __init__(self) -> None:
        super().__init__()
        self.content = io.BytesIO()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: ARG002 (torch names the arguments)
        self.content = value
