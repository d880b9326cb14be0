"""Weights that go to rollout servers over a connection, by gloo, to the receiver that runs in vLLM."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_rollouts import FakeRolloutServer
from rollout_fleets import ASKS, SAMPLING, fleet_of, rows_by, until, weights
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder
from megatron_sip.errors import CheckpointError, ConfigError, ServiceError
from megatron_sip.rollout import delivery, receiver, transfer
from megatron_sip.rollout.delivery import ByConnection, described
from megatron_sip.rollout.label import is_proven, loading_label
from megatron_sip.rollout.receiver import StalledError, finish, joined, own_address, patience, received
from megatron_sip.rollout.transfer import Meeting, TransferError, send

Folders = tuple[Path, Path, Path]
CPU = torch.device("cpu")
GLOO = ByConnection("gloo", CPU)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rollouts_are_by_the_weights_that_came(folders: Folders, ranks: int) -> None:
    start, first, second = folders
    with FakeRolloutServer(start) as one, FakeRolloutServer(start) as two:
        one.ranks = ranks
        with fleet_of(start, one, two, delivery=GLOO) as fleet:
            for count, (folder, version) in enumerate([(first, "run-1"), (second, "run-2")], start=1):
                now = weights(folder, version)
                fleet.submit_push(now).result(30)
                assert fleet.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(folder)
                assert [server.receptions for server in (one, two)] == [count, count]
        assert one.reloads == two.reloads == []
        assert len(set(one.checksums)) == 2


def test_the_receiver_needs_torch_alone() -> None:
    """It runs in the server's environment, which has not what the trainer needs."""
    script = "import sys, torch; before = set(sys.modules); import megatron_sip.rollout.receiver as _; "
    script += "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["megatron_sip"]


def test_a_server_that_falls_half_way_takes_no_other_with_it(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, FakeRolloutServer(start) as two:
        one.falls_at = "model.layers.0.mlp.up_proj.weight"
        with fleet_of(start, one, two, delivery=GLOO) as fleet:
            began = time.monotonic()
            fleet.submit_push(weights(first, "run-1")).result(30)
            assert time.monotonic() - began < 15
            assert list(fleet.behind) == [one.url]
            assert "rank 0: RuntimeError: no room for model.layers.0.mlp.up_proj.weight" in fleet.behind[one.url]
            assert one.version.endswith("/failed")
            one.falls_at = None
            fleet.submit_push(weights(first, "run-2")).result(30)
            assert fleet.behind == {}


def test_a_server_without_a_receiver_is_refused_at_the_start(folders: Folders) -> None:
    start, _, _ = folders
    with FakeRolloutServer(start) as one:
        one.ranks = 0
        told = r"--worker-extension-cls megatron_sip\.rollout\.receiver"
        with pytest.raises(ServiceError, match=told), fleet_of(start, one, delivery=GLOO):
            pass


def test_who_has_the_weights_sends_them_again_while_others_write(folders: Folders) -> None:
    """Of two leaders one only can send; it does so until the other has its rollouts."""
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO) as sender:
        now = weights(first, "run-1")
        sender.submit_push(now).result(30)
        restarts = [one.restart]
        one.after_completion = lambda: restarts.pop()() if restarts else None
        upkeep = sender.submit_upkeep(now)
        assert upkeep is not None
        with fleet_of(start, one, delivery=GLOO, thoroughly=False) as other:
            assert other.submit_rollouts(ASKS, SAMPLING, now).result(30) == rows_by(first)
        upkeep.cancel()
        assert one.receptions == 2
        assert is_proven(one.version, "run-1")


def test_a_leader_gives_up_on_servers_that_nobody_sends_to(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO, timeout=1.0) as fleet:
        now = weights(first, "run-1")
        with pytest.raises(ServiceError, match="lost their weights"):
            fleet.submit_rollouts(ASKS, SAMPLING, now).result(30)


def test_a_leader_waits_while_another_sends_again(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO, timeout=0.5) as fleet:
        one.version = loading_label("run-1", "other.0")
        future = fleet.submit_rollouts(ASKS, SAMPLING, weights(first, "run-1"))
        for attempt in range(1, 6):
            time.sleep(0.3)
            assert not future.done(), "each attempt has its own time"
            one.version = loading_label("run-1", f"other.{attempt}")
        with pytest.raises(ServiceError, match="lost their weights"):
            future.result(30)


def test_it_waits_for_a_server_that_is_away(folders: Folders) -> None:
    start, first, second = folders
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        port = one.port
        one.close()
        future = fleet.submit_push(weights(second, "run-2"))
        until(lambda: fleet.waits_for is not None, future)
        with FakeRolloutServer(start, port=port) as again:
            future.result(30)
            assert is_proven(again.version, "run-2")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_connection_that_breaks_ends_the_load_in_order(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """No rank raises, since vLLM would take that for the answer of all; the next push is whole."""
    start, first, _ = folders

    def broken(meeting: Meeting, folder: Path, tensors: receiver.Tensors, *others: Any) -> None:
        send(meeting, folder, tensors[:4], *others)

    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO) as fleet:
        one.ranks = ranks
        monkeypatch.setattr(delivery, "send", broken)
        with pytest.raises(ServiceError, match=r"did not come through \(rank 0: "):
            fleet.submit_push(weights(first, "run-1")).result(30)
        assert len(one.faults) == ranks
        assert one.version.endswith("/failed")
        monkeypatch.setattr(delivery, "send", send)
        fleet.submit_push(weights(first, "run-2")).result(30)
        assert len(one.faults) == ranks
        assert is_proven(one.version, "run-2")


def test_a_sender_that_fails_does_not_wait_for_the_server(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    start, first, _ = folders

    def failing(*_: object) -> None:
        raise TransferError("no way")

    monkeypatch.setattr(delivery, "send", failing)
    monkeypatch.setattr(delivery, "OTHER_END_SECONDS", 0.2)
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO, timeout=60.0) as fleet:
        began = time.monotonic()
        with pytest.raises(ServiceError, match=r"no way; the server does not say that it has them"):
            fleet.submit_push(weights(first, "run-1")).result(30)
        assert time.monotonic() - began < 5


def test_a_stop_ends_a_transfer_in_the_middle(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    start, first, _ = folders
    monkeypatch.setattr(receiver, "WINDOW_BYTES", 1)
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO, timeout=30.0) as fleet:
        one.falls_at, one.goes_on = "model.embed_tokens.weight", threading.Event()
        future = fleet.submit_push(weights(first, "run-1"))
        until(lambda: one.receptions, future)
        time.sleep(0.3)
        future.cancel()
        began = time.monotonic()
        while any(thread.name == "sip-transfer" for thread in threading.enumerate()):
            assert time.monotonic() - began < 1, "the sender's thread ends at once"
            time.sleep(0.01)
        one.goes_on.set()
        fleet.submit_push(weights(first, "run-2")).result(30)
        assert is_proven(one.version, "run-2")


def test_a_failed_push_leaves_no_socket(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the sender has an error, whose frames hold the meeting, and nobody looks for cycles."""
    start, first, _ = folders
    monkeypatch.setattr(receiver, "WINDOW_BYTES", 1)
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO) as fleet:
        fleet.submit_push(weights(first, "run-1")).result(30)
        one.falls_at = "lm_head.weight"
        gc.collect()
        gc.disable()
        try:
            before = listening()
            for number in range(3):
                future = fleet.submit_push(weights(first, f"run-{number + 2}"))
                until(lambda: fleet.waits_for is not None, future)
                future.cancel()
            until_equal(before)
        finally:
            gc.enable()


def listening() -> set[str]:
    """The addresses at which sockets of this machine listen."""
    tables = [table.read_text() for table in Path("/proc/net").glob("tcp*")]
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    mine = {os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.exists()}
    return {fields[1] for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine}


def until_equal(wanted: set[str]) -> None:
    deadline = time.monotonic() + 10
    while listening() != wanted:
        assert time.monotonic() < deadline, listening() - wanted
        time.sleep(0.05)


def taken(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a receiver in this process gets of a folder's weights in this type."""
    tensors, meeting = described(folder), Meeting("127.0.0.1", 2)
    assert {name for _, name, _ in tensors} == {str(dtype).removeprefix("torch.")}
    thread = threading.Thread(target=send, args=(meeting, folder, tensors, "gloo", CPU, lambda: False))
    thread.start()
    with joined("127.0.0.1", meeting.port, meeting.token, 1, 2, "gloo", CPU, tensors) as group:
        got = dict(received(group, tensors, CPU))
    thread.join(20)
    assert not thread.is_alive()
    return got


@pytest.mark.parametrize("window", [1, 1 << 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_comes_through(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, window: int
) -> None:
    monkeypatch.setattr(receiver, "WINDOW_BYTES", window)
    LlamaForCausalLM.from_pretrained(folders[1], dtype=dtype).save_pretrained(tmp_path / "hf")
    got = taken(tmp_path / "hf", dtype)
    with SafetensorsFolder(tmp_path / "hf") as source:
        assert got.keys() == source.names
        assert all(torch.equal(tensor, source.lazy(name)[:]) for name, tensor in got.items())
    assert len({tensor.data_ptr() for tensor in got.values()}) == len(got), "vLLM keeps some for later"


def die(port: int, token: str, tensors: receiver.Tensors) -> None:
    """A server's process that ends when the first tensor has come."""
    receiver.WINDOW_BYTES = 1
    with joined("127.0.0.1", port, token, 1, 2, "gloo", CPU, tensors) as group:
        next(received(group, tensors, CPU))
        os._exit(1)


def test_a_server_that_dies_ends_the_sender(tmp_path: Path) -> None:
    # The second is more than the sockets between them hold.
    save_file({"a": torch.ones(4), "b": torch.ones(1 << 24)}, tmp_path / "model.safetensors")
    tensors, meeting = described(tmp_path), Meeting("127.0.0.1", 2)
    process = multiprocessing.get_context("spawn").Process(target=die, args=(meeting.port, meeting.token, tensors))
    process.start()
    with pytest.raises(TransferError) as fault:
        send(meeting, tmp_path, tensors, "gloo", CPU, lambda: False)
    assert "did not come" not in str(fault.value), "it is told by the connection, not by the clock"
    process.join(20)
    assert process.exitcode == 1


def test_a_late_call_of_another_transfer_meets_nobody(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.3)
    meeting = Meeting("127.0.0.1", 2)
    place = dist.TCPStore("127.0.0.1", meeting.port, is_master=False, wait_for_workers=False)
    dist.PrefixStore("another", place).add(receiver.HERE, 3)
    with pytest.raises(TransferError, match="did not come to"):
        send(meeting, folders[1], described(folders[1]), "gloo", CPU, lambda: False)


def test_ranks_that_do_not_come(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.1)
    meeting = Meeting("127.0.0.1", 2)
    with pytest.raises(TransferError, match=r"did not come to 127\.0\.0\.1"):
        send(meeting, folders[1], described(folders[1]), "gloo", CPU, lambda: False)
    with pytest.raises(TransferError, match="did not take them"):
        send(meeting, folders[1], described(folders[1]), "gloo", CPU, lambda: True)


def test_a_tensor_that_does_not_come_through() -> None:
    class Never:
        def is_completed(self) -> bool:
            return False

    with pytest.raises(StalledError, match=r"norm did not come through"):
        finish(Never(), "norm", 0.05)
    with pytest.raises(StalledError, match=r"not wanted"):
        finish(Never(), "norm", 0.05, lambda: True)
    assert patience([]) == 60.0
    assert patience([("a", "bfloat16", [1000, 50_000]), ("b", "float32", [2])]) == 62.0


def test_it_listens_on_one_address() -> None:
    meeting = Meeting(own_address("127.0.0.1", 80), 2)
    mine = [address for address in listening() if address.endswith(f":{meeting.port:04X}")]
    assert mine == [f"0100007F:{meeting.port:04X}"]


def test_nccl_is_for_gpus_and_a_folder_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rollout-transfer nccl needs a GPU"):
        ByConnection("nccl", CPU)
    with pytest.raises(CheckpointError, match="no such folder"):
        described(tmp_path / "none")
