"""Where a conversion reads: a Hugging Face folder or a checkpoint of ours, both as the Hugging Face tensors of a slot.

Nothing is read before it is asked for, and padding is off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.checkpoint.hf_folder import open_llama
from megatron_sip.checkpoint.hf_names import EMBEDDING, TABLE, Kind, LlamaShape, Slot, llama_shape, slots
from megatron_sip.checkpoint.hf_stage import policy_shape
from megatron_sip.checkpoint.hf_tensors import Sliceable, all_hf_shapes, unpack
from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder
from megatron_sip.checkpoint.stream_read import StoredTensors
from megatron_sip.config.groups import ModelConfig
from megatron_sip.errors import CheckpointError

POLICY = ""
"""The prefix under which a checkpoint stores the policy; its optimizer's and its reference's tensors have a name."""


class Source(Protocol):
    """All tensors of one model, or of something shaped like it (a moment of the optimizer)."""

    @property
    def shape(self) -> LlamaShape:
        """The model with the padding that the source has."""
        ...

    def dtypes(self) -> set[torch.dtype]:
        """The types that occur."""
        ...

    def parts(self, slot: Slot, dtype: torch.dtype) -> Sequence[Sliceable]:
        """The Hugging Face tensors of a slot in `dtype`, as views that read what is taken of them."""
        ...


@dataclass(frozen=True)
class HfSource:
    """A Hugging Face folder."""

    shape: LlamaShape
    tensors: SafetensorsFolder

    def dtypes(self) -> set[torch.dtype]:
        """The types that occur."""
        return {self.tensors.dtype(name) for name in all_hf_shapes(self.shape)}

    def parts(self, slot: Slot, dtype: torch.dtype) -> Sequence[Sliceable]:
        """Views of the mapped files."""
        return [_InType(self.tensors.lazy(name), dtype) for name in slot.hf(self.shape.tied)]


@dataclass(frozen=True)
class _InType:
    """A view whose parts come in another type."""

    view: Any
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        part: torch.Tensor = self.view[index]
        return part.to(self.dtype)


@contextmanager
def open_hf(folder: Path) -> Iterator[tuple[ModelConfig, HfSource]]:
    """A Hugging Face Llama whose config and tensors were checked.

    Raises:
        CheckpointError: it is no Llama that the policy can be, or its tensors are not those of its config.
    """
    model = model_config_from_hf(folder)
    shape = llama_shape(model)
    with open_llama(folder, shape) as tensors:
        yield model, HfSource(shape, tensors)


class McoreSource:
    """What a checkpoint of ours stores under one prefix, whatever layout wrote it.

    A slot is read whole and kept until another is asked for, since each of its parts may be wanted in pieces.

    Raises:
        CheckpointError: a tensor of the model is missing, or belongs to another model.
    """

    def __init__(self, stored: StoredTensors, model: ModelConfig, prefix: str = POLICY) -> None:
        self._stored, self._prefix = stored, prefix
        unpadded = llama_shape(model)
        self._names = {slot: self._name_of(slot) for slot in slots(unpadded)}
        self._refuse_surplus()
        self.shape = policy_shape({slot: self._size_of(slot, unpadded) for slot in self._names}, model, 1)
        self._kept: tuple[Slot, torch.dtype, Sequence[torch.Tensor]] | None = None

    def _name_of(self, slot: Slot) -> str:
        for name in slot.entry.spellings:
            if self._prefix + name in self._stored.names:
                return self._prefix + name
        if self._prefix == POLICY and slot.entry is EMBEDDING:
            raise CheckpointError(f"{self._stored.folder} holds no policy: {slot.entry.stored} is not in it")
        raise CheckpointError(f"{self._stored.folder} lacks {self._prefix}{slot.entry.stored}")

    def _refuse_surplus(self) -> None:
        """Refuse tensors of a model that would be left behind: a head of its own, say, where the config has it tied."""
        spelled = {self._prefix + name for entry in TABLE for name in entry.spellings}
        surplus = spelled & self._stored.names - set(self._names.values())
        if surplus:
            raise CheckpointError(
                f"{self._stored.folder} holds {min(surplus)}, which the model of its run_config.yaml does not have"
            )

    def _size_of(self, slot: Slot, shape: LlamaShape) -> tuple[int, ...]:
        """Shape of one slot's tensor, without the axis of the layers."""
        name, size = self._names[slot], self._stored.size(self._names[slot])
        expected = (1 if slot.entry.kind is Kind.NORM else 2) + (slot.layer is not None)
        if len(size) != expected:
            raise CheckpointError(f"{self._stored.folder}: {name} has {len(size)} dimensions, expected {expected}")
        if slot.layer is None:
            return size
        if size[0] != shape.num_layers:
            raise CheckpointError(
                f"{self._stored.folder}: {name} has {size[0]} layers, its run_config.yaml {shape.num_layers}"
            )
        return size[1:]

    def dtypes(self) -> set[torch.dtype]:
        """The types that occur."""
        return {self._stored.dtype(name) for name in self._names.values()}

    def parts(self, slot: Slot, dtype: torch.dtype) -> Sequence[torch.Tensor]:
        """The slot's tensors, read now or just before."""
        if self._kept is None or self._kept[:2] != (slot, dtype):
            self._kept = None  # let go before the next is read
            self._kept = (slot, dtype, unpack(slot, self._read(slot, dtype), self.shape))
        return self._kept[2]

    def _read(self, slot: Slot, dtype: torch.dtype) -> torch.Tensor:
        name = self._names[slot]
        size = self._stored.size(name)
        if slot.layer is None:
            return self._stored.read(name, (0,) * len(size), size, dtype)
        return self._stored.read(name, (slot.layer, *(0 for _ in size[1:])), (1, *size[1:]), dtype)[0]


def one_type(source: Source, where: Path) -> torch.dtype:
    """The type that all tensors of a source have.

    Raises:
        CheckpointError: there are several.
    """
    found = source.dtypes()
    if len(found) != 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise CheckpointError(f"{where} holds weights of several types ({names}); choose one with --dtype")
    return found.pop()


def prefixes(stored: StoredTensors) -> tuple[list[str], list[str]]:
    """Under which prefixes a checkpoint stores tensors of the model's names, and the names of all other tensors."""
    known = {name for entry in TABLE for name in entry.spellings}
    found: set[str] = set()
    others: list[str] = []
    for name in sorted(stored.names):
        base = next((base for base in known if name == base or name.endswith(f".{base}")), None)
        if base is None:
            others.append(name)
        else:
            found.add(name.removesuffix(base))
    return sorted(found), others
