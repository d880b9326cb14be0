"""Files that anybody may have written: what they name is refused, and none of it runs."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_sip.checkpoint.restricted import (
    METADATA,
    RestrictedBytes,
    RestrictedReader,
    UnreadableFileError,
    UnsafeFileError,
    described_sizes,
    load_pickled,
    read_metadata,
)


class Attack:
    """Unpickled carelessly, it makes the marker file."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a tensor and of an object, which torch stores as bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"weight": torch.arange(6.0).reshape(2, 3), "note": {"step": 3}},
            checkpoint_id=tmp_path / "saved",
            no_dist=True,
        )
    return tmp_path / "saved"


def load(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=RestrictedReader(folder), planner=RestrictedBytes(), no_dist=True)
    return state


def put_item(folder: Path, name: str, content: bytes) -> None:
    """Let the item `name` hold `content`, as bytes."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    (folder / "evil.distcp").write_bytes(content)
    for index, info in metadata.storage_data.items():
        if index.fqn == name:
            place = replace(info, relative_path="evil.distcp", offset=0, length=len(content))
            metadata.storage_data[index] = place
    metadata.state_dict_metadata[name] = dcp.BytesStorageMetadata()
    metadata.storage_data = {
        dcp.metadata.MetadataIndex(name) if index.fqn == name else index: info
        for index, info in metadata.storage_data.items()
    }
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def saved_bytes(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def test_the_attack_works_where_nobody_looks(marker: Path) -> None:
    pickle.loads(pickle.dumps(Attack(marker)))
    assert marker.exists()


def test_a_lawful_checkpoint_is_read(folder: Path) -> None:
    state = load(folder, {"weight": torch.zeros(2, 3), "note": {"step": 0}})
    assert torch.equal(state["weight"], torch.arange(6.0).reshape(2, 3))
    assert state["note"] == {"step": 3}
    [(file, size)] = described_sizes(read_metadata(folder)).items()
    assert (folder / file).stat().st_size == size


@pytest.mark.parametrize("where", ["instead of it", "in its state", "in its places", "as an attribute"])
def test_metadata_that_name_a_program_run_nothing(folder: Path, marker: Path, where: str) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    if where == "in its state":
        metadata.state_dict_metadata["evil"] = Attack(marker)
    elif where == "in its places":
        metadata.storage_data[Attack(marker)] = None
    elif where == "as an attribute":
        metadata.all_local_plans = [Attack(marker)]
    (folder / METADATA).write_bytes(pickle.dumps(Attack(marker) if where == "instead of it" else metadata))
    with pytest.raises(UnsafeFileError, match=rf"\{METADATA} names posix\.system, which no checkpoint needs"):
        RestrictedReader(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("pickled", "name"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        # A way around a list of modules: attributes of an allowed module, and of an allowed class.
        (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", "torch.os.system"),
        (b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", "torch.load"),
        (b"\x80\x04\x8c\x05torch\x8c\x0dSize.__init__\x93.", "torch.Size.__init__"),
    ],
)
def test_every_other_name_is_refused(folder: Path, pickled: bytes, name: str) -> None:
    (folder / METADATA).write_bytes(pickled)
    with pytest.raises(UnsafeFileError, match=f"names {name}, which no checkpoint needs"):
        read_metadata(folder)


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def with_attribute(target: bytes, name: str, value: bytes) -> bytes:
    """Operations that set an attribute of what `target` makes, as objects with slots do, and drop it again."""
    return target + b"N}\x8c" + bytes([len(name)]) + name.encode() + value + b"s\x86b0"


TEXT = b"\x8c\x0a../../evil"
PROPERTIES = named("torch.distributed.checkpoint.metadata", "TensorProperties")
INDEX = named("torch.distributed.checkpoint.metadata", "MetadataIndex")
ENCODING = named("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")


@pytest.mark.parametrize(
    "operations",
    [
        with_attribute(named("pathlib", "PosixPath"), "name", TEXT),
        with_attribute(named("torch.serialization", "_get_layout"), "cache", b"}"),
        with_attribute(PROPERTIES, "__setstate__", TEXT),
        with_attribute(INDEX + b")\x81", "fqn", TEXT),  # of an object, but not as it is written
        with_attribute(ENCODING + b"K\x00\x85R", "evil", TEXT),  # of a member, which all share
        with_attribute(named("torch", "float32"), "evil", TEXT),
        PROPERTIES + b")\x81}\x8c\x09__class__" + TEXT + b"sb0",
    ],
)
def test_nothing_that_lives_longer_than_the_file_is_changed(folder: Path, operations: bytes) -> None:
    """A class or a function that took an attribute would be another one for the whole process.

    With `PosixPath.name` set, every path would pass for a file of the folder.
    """
    [layouts] = [dict(torch.serialization._get_layout.cache)]
    lawful = (folder / METADATA).read_bytes()
    assert lawful[:2] == b"\x80\x04"
    (folder / METADATA).write_bytes(b"\x80\x04" + operations + lawful[2:])
    with pytest.raises(UnsafeFileError, match=r"names a change of .*, which no checkpoint needs"):
        read_metadata(folder)
    assert Path("a/b").name == "b"
    assert torch.serialization._get_layout.cache == layouts
    assert "__setstate__" in vars(dcp.metadata.TensorProperties)


@pytest.mark.parametrize(
    ("operations", "says"),
    [
        (ENCODING + b"K\x00\x85RK\x00\x85R.", "a call of an object of type _MEM_FORMAT_ENCODING"),
        (PROPERTIES + b"K\x00\x85R.", "a call of torch.distributed.checkpoint.metadata.TensorProperties"),
        (
            PROPERTIES + b"K\x00\x85\x81.",
            "a new torch.distributed.checkpoint.metadata.TensorProperties made from values",
        ),
        (named("torch", "Size") + b")\x81.", "a new torch.Size made from values"),
        (b"itorch\nSize\n.", "an operation of pickle"),
        (b"\x80\x04\x82\x01.", "an operation of pickle"),
    ],
)
def test_only_what_stands_in_a_checkpoint_is_called(folder: Path, operations: bytes, says: str) -> None:
    (folder / METADATA).write_bytes(operations)
    with pytest.raises(UnsafeFileError, match=f"names {says}, which no checkpoint needs"):
        read_metadata(folder)


def test_metadata_are_read_as_pickle_reads_them(folder: Path) -> None:
    """Also those of a folder that was named by a path, and with the plans of all ranks as megatron-core adds them."""
    metadata = pickle.loads((folder / METADATA).read_bytes())
    chunk = dcp.metadata.ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((2, 3)))
    data = dcp.planner.TensorWriteData(chunk, dcp.metadata.TensorProperties(torch.bfloat16), torch.Size((2, 3)))
    item = dcp.planner.WriteItem(
        dcp.metadata.MetadataIndex("a", (0, 0), 1), dcp.planner.WriteItemType.SHARD, tensor_data=data
    )
    metadata.all_local_plans = [dcp.planner.SavePlan([item])]
    metadata.storage_meta = dcp.metadata.StorageMeta(str(folder), "a", "b")
    for protocol in (2, 4, 5):
        (folder / METADATA).write_bytes(pickle.dumps(metadata, protocol))
        assert vars(read_metadata(folder)) == vars(metadata)
    metadata.storage_meta.checkpoint_id = folder
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    assert read_metadata(folder).storage_meta.checkpoint_id == str(folder)


@pytest.mark.parametrize("path", ["../elsewhere.distcp", "/etc/passwd", "sub/file.distcp", "..", ""])
def test_a_tensor_outside_the_folder_is_refused(folder: Path, path: str) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    for index, info in list(metadata.storage_data.items()):
        metadata.storage_data[index] = replace(info, relative_path=path)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnsafeFileError, match="is no file of its folder"):
        read_metadata(folder)


def test_an_item_before_its_file_is_refused(folder: Path) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    for index, info in list(metadata.storage_data.items()):
        metadata.storage_data[index] = replace(info, offset=-8)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(UnreadableFileError, match="is damaged: it places an item at"):
        read_metadata(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"no pickle", pickle.dumps({"a": 1}), pickle.dumps(3)])
def test_damaged_metadata_are_told_from_unsafe_ones(folder: Path, content: bytes) -> None:
    (folder / METADATA).write_bytes(content)
    with pytest.raises(UnreadableFileError, match="is damaged"):
        read_metadata(folder)


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFileError, match="cannot be read: No such file"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["note", "weight"])
def test_items_of_bytes_run_nothing(folder: Path, marker: Path, name: str) -> None:
    """Also where a tensor is wanted: the metadata of the folder decide what an item is."""
    put_item(folder, "note.step" if name == "note" else name, saved_bytes([Attack(marker)]))
    with pytest.raises(dcp.api.CheckpointException) as caught:
        load(folder, {name: {"step": 0} if name == "note" else torch.zeros(2, 3)})
    [(error, _)] = caught.value.failures.values()
    assert isinstance(error, UnsafeFileError)
    assert "posix.system, which no checkpoint needs" in str(error)
    assert not marker.exists()


@pytest.mark.parametrize("wrapped", [torch.tensor(list(b"\x80\x04N.")).to(torch.uint8), io.BytesIO(b"\x80\x04N.")])
def test_extra_state_of_fp8_layers_is_refused(wrapped: torch.Tensor | io.BytesIO) -> None:
    """Transformer Engine would unpickle what such an item holds."""
    item = dcp.planner.ReadItem(
        dcp.planner.LoadItemType.BYTE_IO,
        *(dcp.metadata.MetadataIndex("layer._extra_state/shard_0_1"), torch.Size((0,))) * 2,
        torch.Size((0,)),
    )
    planner = RestrictedBytes(flatten_state_dict=False)
    planner.state_dict = {}
    with pytest.raises(UnsafeFileError, match="state of FP8 training"), torch.serialization.safe_globals([io.BytesIO]):
        planner.load_bytes(item, io.BytesIO(saved_bytes([wrapped])))
    planner.load_bytes(item, io.BytesIO(saved_bytes([None, torch.empty(0, dtype=torch.uint8)])))
    assert planner.state_dict["layer._extra_state/shard_0_1"][0] is None


def test_a_common_file_that_names_a_program_runs_nothing(tmp_path: Path, marker: Path) -> None:
    torch.save({"iteration": 3, "evil": Attack(marker)}, tmp_path / "common.pt")
    with pytest.raises(UnsafeFileError, match=r"common\.pt names posix\.system, which no checkpoint needs"):
        load_pickled(tmp_path / "common.pt", str(tmp_path / "common.pt"))
    assert not marker.exists()


def test_an_environment_variable_does_not_open_the_door(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(Attack(marker), tmp_path / "common.pt")
    with pytest.raises(UnsafeFileError):
        load_pickled(tmp_path / "common.pt", "common.pt")
    assert not marker.exists()


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_a_truncated_common_file_is_damaged(tmp_path: Path, keep: float) -> None:
    whole = saved_bytes({"iteration": 3, "rng": torch.zeros(1000)})
    cut = int(len(whole) * keep) if isinstance(keep, float) else keep
    (tmp_path / "common.pt").write_bytes(whole[:cut])
    with pytest.raises(UnreadableFileError, match="is damaged"):
        load_pickled(tmp_path / "common.pt", "common.pt")
