"""Reading parts of safetensors folders that may be broken or hostile, and writing whole ones or none."""

from __future__ import annotations

import json
import os
import struct
import uuid

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder, SafetensorsWriter, new_folder
from megatron_sip.errors import CheckpointError


def sharded(folder, files):
    folder.mkdir()
    weight_map = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path):
    first, second = torch.arange(12.0).reshape(3, 4), torch.arange(4.0)
    return sharded(tmp_path / "in", {"a.safetensors": {"one": first}, "b.safetensors": {"two": second}})


def test_parts_are_read_over_shards(folder):
    with SafetensorsFolder(folder) as source:
        assert source.names == {"one", "two"}
        assert source.lazy("one")[1:2, 1:3].tolist() == [[5.0, 6.0]]
        assert source.lazy("two")[:].tolist() == [0.0, 1.0, 2.0, 3.0]
        with pytest.raises(CheckpointError, match="no tensor three"):
            source.lazy("three")


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..", "", "a\\b.safetensors", "w.bin", 7],
)
def test_an_index_may_not_name_files_elsewhere(folder, file):
    save_file({"one": torch.ones(1)}, folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"one": file}}))
    with pytest.raises(CheckpointError, match=r"only \.safetensors files in the same folder"):
        SafetensorsFolder(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_a_broken_index_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsFolder(folder)


def test_a_missing_file_a_truncated_file_and_a_wrong_index_are_named(folder):
    b = folder / "b.safetensors"
    whole = b.read_bytes()
    b.write_bytes(whole[:-1])
    with SafetensorsFolder(folder) as source, pytest.raises(CheckpointError, match=r"b\.safetensors is truncated"):
        source.lazy("two")
    b.unlink()
    with SafetensorsFolder(folder) as source, pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        source.lazy("two")
    save_file({"other": torch.ones(1)}, b)
    with SafetensorsFolder(folder) as source, pytest.raises(CheckpointError, match="no tensor two, though the index"):
        source.lazy("two")


def test_types_that_are_no_plain_floats_are_refused(folder):
    save_file({"two": torch.ones(4, dtype=torch.int8)}, folder / "b.safetensors")
    with SafetensorsFolder(folder) as source, pytest.raises(CheckpointError, match="type I8"):
        source.require_shapes({"two": (4,)})


def raw_file(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        raw_file(b"{}", b"", length=2**63),
        raw_file(b"{}", b"", length=200_000_000),
        raw_file(b"{}", b"", length=100),
        raw_file(b"{", b""),
        raw_file(b"[]", b""),
        raw_file(b'{"two": "\xff"}', b""),
        raw_file(json.dumps({"two": entry(0, 16, [4])}).encode(), bytes(8)),
        raw_file(json.dumps({"two": entry(0, 16, [5])}).encode(), bytes(16)),
        raw_file(json.dumps({"two": entry(16, 32, [4])}).encode(), bytes(32)),
        raw_file(json.dumps({"two": entry(0, 16, [4]), "x": entry(8, 24, [4])}).encode(), bytes(24)),
        raw_file(json.dumps({"two": entry(-16, 0, [4])}).encode(), bytes(16)),
        raw_file(json.dumps({"two": entry(0, 16, [2**32, 2**32])}).encode(), bytes(16)),
        raw_file(json.dumps({"two": entry(0, 16, [4], "P32")}).encode(), bytes(16)),
        raw_file(json.dumps({"two": entry(0, 16, [4])}).encode(), bytes(64)),
    ],
)
def test_headers_that_lie_are_refused(folder, content):
    """Lengths beyond the file or of absurd size, broken JSON, offsets that overlap, leave holes or leave the file."""
    (folder / "b.safetensors").write_bytes(content)
    with SafetensorsFolder(folder) as source, pytest.raises(CheckpointError, match=r"b\.safetensors"):
        source.lazy("two")


def test_links_are_followed_to_files_only(folder):
    """As in the Hugging Face cache. Nothing but tensors of the right names and shapes comes out of a file."""
    blob = folder.parent / "blob"
    (folder / "b.safetensors").rename(blob)
    (folder / "b.safetensors").symlink_to(blob)
    with SafetensorsFolder(folder) as source:
        assert source.lazy("two")[:].tolist() == [0.0, 1.0, 2.0, 3.0]
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to("/dev/zero")
    with SafetensorsFolder(folder) as source, pytest.raises(CheckpointError, match=r"b\.safetensors is missing"):
        source.lazy("two")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("limit_in_elements", "files"), [(1000, 1), (22, 2), (21, 3), (1, 3)])
def test_written_shards_hold_the_same_bits(tmp_path, dtype, limit_in_elements, files):
    torch.manual_seed(0)
    tensors = {"x": torch.randn(3, 5).to(dtype), "y": torch.randn(7).to(dtype), "z": torch.randn(5, 3, 1).to(dtype)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    limit = limit_in_elements * dtype.itemsize
    with new_folder(tmp_path / "out") as temporary, SafetensorsWriter(temporary, shapes, dtype, limit) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(paths) == files
    read = {}
    for path in paths:
        read |= load_file(path)
    assert all(torch.equal(read[name], tensor) and read[name].dtype == dtype for name, tensor in tensors.items())
    with SafetensorsFolder(tmp_path / "out") as source:
        source.require_shapes(shapes)


def test_slices_and_transposes_are_written_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    with (
        new_folder(tmp_path / "out") as temporary,
        SafetensorsWriter(temporary, {"t": (4, 3), "part": (3, 2)}, torch.float32) as writer,
    ):
        writer.write("t", base.t())
        writer.write("part", base[:, 1:3])
        writer.finish()
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(read["t"], base.t())
    assert torch.equal(read["part"], base[:, 1:3])


def test_the_writer_takes_only_what_was_planned(tmp_path):
    with SafetensorsWriter(tmp_path, {"x": (2,), "y": (2,)}, torch.float32) as writer:
        with pytest.raises(ValueError, match="expected tensor x, got y"):
            writer.write("y", torch.ones(2))
        writer.write("x", torch.ones(2))
        with pytest.raises(ValueError, match="expected tensor y"):
            writer.write("y", torch.ones(3))
        with pytest.raises(ValueError, match="1 tensors were not written"):
            writer.finish()
    with pytest.raises(CheckpointError, match="float64"):
        SafetensorsWriter(tmp_path, {"x": (2,)}, torch.float64)


def write_half(target):
    with new_folder(target) as temporary:
        (temporary / "half").write_text("half")
        assert temporary.parent == target.parent
        raise RuntimeError("midway")


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="never overwritten"), new_folder(taken):
        pass
    with pytest.raises(RuntimeError, match="midway"):
        write_half(tmp_path / "out")
    with pytest.raises(CheckpointError, match="No space left"), new_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (taken / "precious").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "empty" / "file").exists()


def test_two_writers_with_one_pid_do_not_touch_each_other(tmp_path, monkeypatch):
    """As in two containers over one disk: pids are the same there, and the later one fails."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with new_folder(tmp_path / "out") as first:
        (first / "file").write_text("first")
        with pytest.raises(RuntimeError, match="midway"):
            write_half(tmp_path / "out")
        assert (first / "file").read_text() == "first"
        with monkeypatch.context() as patch:  # whatever its name, a folder that is there is another's
            patch.setattr(uuid, "uuid4", lambda: uuid.UUID(hex=first.name.rsplit("-", 1)[1] + "0" * 16))
            with pytest.raises(CheckpointError, match=r"cannot write .*File exists"), new_folder(tmp_path / "out"):
                pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "first"
