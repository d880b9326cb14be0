"""Reading parts of tensors out of a safetensors folder, and writing one that appears only when it is whole."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from megatron_sip.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_BYTES = 5 * 10**9
_DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def require_safetensors(folder: Path) -> None:
    """Refuse a folder without safetensors weights, naming what it has instead.

    Raises:
        CheckpointError: no folder, or only formats that are not read (pickled .bin, GGUF).
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return
    for pattern, why in (
        ("*.gguf", "holds GGUF weights only"),
        ("*.bin", "holds pickled .bin weights only, which could run code when read"),
        ("*.pth", "holds pickled .pth weights only, which could run code when read"),
    ):
        if any(folder.glob(pattern)):
            raise CheckpointError(f"{folder} {why}; save it as safetensors with transformers first")
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")


class SafetensorsFolder:
    """The tensors of a folder, opened lazily; use it as a context manager.

    Raises:
        CheckpointError: naming the folder, file or tensor that is missing or broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        require_safetensors(self.folder)
        self._open: dict[str, Any] = {}
        single = self.folder / SINGLE_FILE
        if single.is_file():
            self._file_of = dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)
        else:
            self._file_of = _read_index(self.folder / INDEX_FILE)

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.clear()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def lazy(self, name: str) -> Any:
        """A slice view of one tensor: `view[a:b]`, `view[:, a:b]` read only that part."""
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        file = self._file_of[name]
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file} has no tensor {name}, though the index says so") from error

    def dtype(self, name: str) -> torch.dtype:
        """Type of one tensor.

        Raises:
            CheckpointError: it is not there, or no floating point type that is read.
        """
        found = self.lazy(name).get_dtype()
        for dtype, code in _DTYPE_CODES.items():
            if code == found:
                return dtype
        raise CheckpointError(f"{self.folder}: tensor {name} has type {found}; only F32, BF16 and F16 are read")

    def require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse the folder unless each named tensor is there with its shape and a floating point type."""
        for name, expected in shapes.items():
            found = tuple(self.lazy(name).get_shape())
            if found != expected:
                raise CheckpointError(f"{self.folder}: tensor {name} has shape {found}, config.json means {expected}")
            self.dtype(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, though the index names it")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is truncated or no safetensors file: {error}") from error
        return self._open[file]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name; every file is a plain name in the index's own folder."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path} has no weight_map")
    for name, file in files.items():
        plain = isinstance(file, str) and PurePosixPath(file).name == file and "\\" not in file and "\0" not in file
        if not plain or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: the file of {name} is {file!r}; only .safetensors files in the same folder are read"
            )
    return files


@contextmanager
def new_folder(target: str | Path, durable: bool = True) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends without an exception.

    With `durable` it is on the disk before it has its name; without, only a reader sees it whole or not at all.

    Raises:
        CheckpointError: `target` exists and is not empty, or the disk refuses.
    """
    final = Path(target).absolute()
    require_absent(final)
    # A name that nobody has: a pid is unique within one container only, and the disk may be shared.
    temporary = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:16]}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise _refused(final, error) from error
    try:
        yield temporary
        if durable:
            for path in temporary.rglob("*"):
                _sync(path)
            _sync(temporary)
        temporary.rename(final)
        if durable:
            _sync(final.parent)
    except OSError as error:
        raise _refused(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refused(final: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write {final}: {error.strerror or error}; nothing was changed there")


def require_absent(target: str | Path) -> None:
    """Refuse to overwrite.

    Raises:
        CheckpointError: `target` is a file, or a folder that holds something.
    """
    path = Path(target)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} exists and is not empty; it is never overwritten, name another folder")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SafetensorsWriter:
    """Streams tensors of one dtype into shards whose headers are written before the data: no shard sits in memory.

    folder           where the files go (see `new_folder`)
    shapes           every tensor with its shape, in the order in which they will be written
    max_shard_bytes  a shard is closed before it grows beyond this, unless one tensor alone does
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        if dtype not in _DTYPE_CODES:
            raise CheckpointError(f"cannot export weights of type {dtype}; choose fp32, bf16 or fp16")
        self._folder, self._shapes, self._dtype = folder, dict(shapes), dtype
        self._shards = _plan_shards(self._shapes, dtype.itemsize, max_shard_bytes)
        self._order = [(number, name) for number, shard in enumerate(self._shards) for name in shard]
        self._written = 0
        self._file: BinaryIO | None = None

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the next tensor, converted to the writer's dtype."""
        number, expected = self._order[self._written] if self._written < len(self._order) else (0, None)
        if name != expected or tuple(tensor.shape) != self._shapes[name]:
            raise ValueError(f"expected tensor {expected}, got {name} {tuple(tensor.shape)}")
        if name == self._shards[number][0]:
            self._start_shard(number)
        assert self._file is not None
        data = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous()
        self._file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._written += 1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close_file()

    def finish(self) -> None:
        """Close the last shard and write the index if there is more than one."""
        if self._written != len(self._order):
            raise ValueError(f"{len(self._order) - self._written} tensors were not written")
        self._close_file()
        if len(self._shards) == 1:
            return
        total = sum(math.prod(shape) for shape in self._shapes.values()) * self._dtype.itemsize
        files = {name: self._file_name(number) for number, name in self._order}
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _file_name(self, number: int) -> str:
        count = len(self._shards)
        return SINGLE_FILE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _start_shard(self, number: int) -> None:
        """Open a shard and write its header: length, then JSON with each tensor's type, shape and byte range."""
        self._close_file()
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self._shards[number]:
            end = offset + math.prod(self._shapes[name]) * self._dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_CODES[self._dtype],
                "shape": list(self._shapes[name]),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format wants the data to start at a multiple of 8 bytes
        self._file = (self._folder / self._file_name(number)).open("xb")
        self._file.write(struct.pack("<Q", len(text)) + text)


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int, max_bytes: int) -> list[list[str]]:
    """Cut the tensors, in order, into runs of at most `max_bytes`."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards
