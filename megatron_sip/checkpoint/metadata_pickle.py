"""The pickle of `.metadata`, read by an unpickler that makes the objects of a checkpoint and does nothing else.

A list of allowed names is not enough: a pickle may also set attributes on what it has named, a class or a function,
and that changes it for the whole process. So names stand for what the table below says, are never imported, and only
a fresh object of torch's own dataclasses takes a state. The C unpickler cannot be told so; the pure one can.
"""

from __future__ import annotations

import os.path
import pickle
from collections.abc import Callable
from enum import Enum
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

_DATACLASSES: tuple[type, ...] = (
    *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorProperties),
    *(metadata.TensorStorageMetadata, metadata.BytesStorageMetadata, metadata.ChunkStorageMetadata),
    filesystem._StorageInfo,
    # The plans of all ranks, which megatron-core adds.
    *(planner.SavePlan, planner.WriteItem, planner.TensorWriteData),
)
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_DTYPES = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class ForbiddenError(Exception):
    """A pickle asks for what no checkpoint needs; the text names it."""


def _path(*parts: object) -> str:
    """In place of PosixPath: the text alone, which the caller checks."""
    if not all(type(part) is str for part in parts):
        raise ValueError("a path of something else than text")
    return os.path.join(*map(str, parts)) if parts else "."


def _layout(name: object) -> torch.layout:
    """In place of torch's function of the same purpose, which keeps a cache."""
    return _LAYOUTS[str(name)]


def _size(values: object) -> torch.Size:
    if not isinstance(values, tuple | list) or not all(type(value) is int for value in values):
        raise ValueError("a size of something else than whole numbers")
    return torch.Size(values)


def _member(kind: type[Enum]) -> Callable[[object], Enum]:
    """What makes a member of its value; the class itself could be called in other ways."""

    def made(value: object) -> Enum:
        return kind(value)

    return made


_ENUMS: tuple[type[Enum], ...] = (metadata._MEM_FORMAT_ENCODING, planner.WriteItemType)
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    **dict.fromkeys((("pathlib._local", "PosixPath"), ("pathlib", "PosixPath")), _path),  # `_local` is of Python 3.13
    **{(kind.__module__, kind.__name__): _member(kind) for kind in _ENUMS},
}
_NAMES: dict[tuple[str, str], Any] = {
    **_DTYPES,
    **_MAKERS,
    **{(kind.__module__, kind.__name__): kind for kind in _DATACLASSES},
}
_GIVEN = {id(stands_for): f"{module}.{name}" for (module, name), stands_for in _NAMES.items()}
_CALLED = frozenset(map(id, _MAKERS.values()))
_NEEDLESS = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.PERSID, pickle.BINPERSID, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)
"""Operations that no pickle of dataclasses has."""


def _described(target: object) -> str:
    """What an error calls it: by the name that the file gave, where it gave one."""
    return _GIVEN.get(id(target)) or f"an object of type {type(target).__name__}"


class MetadataUnpickler(pickle._Unpickler):
    """Reads one `.metadata`; `load` gives whatever object it holds.

    Raises (from `load`):
        ForbiddenError: it names, calls or changes what no checkpoint needs; nothing of it was run.
        pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError and others of a damaged pickle.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for; nothing is imported."""
        try:
            return _NAMES[module, name]
        except KeyError:
            raise ForbiddenError(f"{module}.{name}") from None

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        maker = self.stack[-1]
        if id(maker) not in _CALLED:
            raise ForbiddenError(f"a call of {_described(maker)}")
        self.stack[-1] = maker(*arguments)

    def _new(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack[-1]
        if not any(kind is known for known in _DATACLASSES) or arguments != ():
            raise ForbiddenError(f"a new {_described(kind)} made from values")
        self.stack[-1] = object.__new__(kind)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is metadata.TensorProperties and type(state) is tuple:
            metadata.TensorProperties.__setstate__(target, state)
        elif type(target) in _DATACLASSES and type(state) is dict and all(map(_is_plain, state)):
            vars(target).update(state)
        else:
            raise ForbiddenError(f"a change of {_described(target)}")

    def _needless(self) -> None:
        raise ForbiddenError("an operation of pickle")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys((code[0] for code in _NEEDLESS), _needless),
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.BUILD[0]: _build,
    }


def _is_plain(key: object) -> bool:
    """Whether a key of a state is the name of a field, and not of something that Python itself looks up."""
    return type(key) is str and not key.startswith("_")
