"""Weights that go to rollout servers over a connection, by gloo, to the receiver that runs in vLLM."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from fake_rollouts import FakeRolloutServer
from rollout_fleets import ASKS, SAMPLING, fleet_of, rows_by, until, weights

from megatron_sip.errors import CheckpointError, ConfigError, ServiceError
from megatron_sip.rollout import receiver, transfer
from megatron_sip.rollout.delivery import ByConnection, described
from megatron_sip.rollout.label import is_proven
from megatron_sip.rollout.receiver import StalledError, finish, joined, own_address, received
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
    script = "import sys, megatron_sip.rollout.receiver; print([m for m in sys.modules if m.startswith('megatron')])"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["['megatron_sip',", "'megatron_sip.rollout',", "'megatron_sip.rollout.receiver']"]


def test_a_server_that_falls_half_way_takes_no_other_with_it(folders: Folders) -> None:
    start, first, _ = folders
    with FakeRolloutServer(start) as one, FakeRolloutServer(start) as two:
        one.falls_at = "model.layers.0.mlp.up_proj.weight"
        with fleet_of(start, one, two, delivery=GLOO) as fleet:
            began = time.monotonic()
            fleet.submit_push(weights(first, "run-1")).result(30)
            assert time.monotonic() - began < 15
            assert list(fleet.behind) == [one.url]
            assert "no room for model.layers.0.mlp.up_proj.weight" in fleet.behind[one.url]
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


def test_a_stop_ends_a_transfer_that_nobody_takes(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    start, first, _ = folders
    held = threading.Event()
    with FakeRolloutServer(start) as one, fleet_of(start, one, delivery=GLOO, timeout=30.0) as fleet:

        def stall(self: receiver.WeightReceiver, **_: object) -> None:
            held.set()
            time.sleep(2)

        monkeypatch.setattr(receiver.WeightReceiver, "receive_policy_weights", stall)
        future = fleet.submit_push(weights(first, "run-1"))
        assert held.wait(10)
        future.cancel()
        began = time.monotonic()
        while any(thread.name == "sip-transfer" for thread in threading.enumerate()):
            assert time.monotonic() - began < 1, "the sender's thread ends at once"
            time.sleep(0.01)


def both_ends(folder: Path, take: int | None) -> list[tuple[str, torch.Tensor]]:
    """What a receiver in this process has got after `take` tensors; None: all."""
    tensors, meeting = described(folder), Meeting("127.0.0.1", 2)
    faults: list[BaseException] = []

    def sender() -> None:
        try:
            send(meeting, folder, tensors, "gloo", CPU, lambda: False)
        except TransferError as error:
            faults.append(error)

    thread = threading.Thread(target=sender)
    thread.start()
    got = []
    with joined("127.0.0.1", meeting.port, 1, 2, "gloo") as group:
        for one in received(group, tensors, CPU):
            got.append(one)
            if len(got) == take:
                break
        del group
    thread.join(20)
    assert not thread.is_alive()
    assert bool(faults) == (take is not None)
    return got


def test_every_bit_comes_through(folders: Folders) -> None:
    got = dict(both_ends(folders[1], None))
    with transfer.SafetensorsFolder(folders[1]) as source:
        assert got.keys() == source.names
        assert all(torch.equal(tensor, source.lazy(name)[:]) for name, tensor in got.items())
    assert len({tensor.data_ptr() for tensor in got.values()}) == len(got), "vLLM keeps some for later"


def test_a_receiver_that_dies_ends_the_sender(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "STALL_SECONDS", 2.0)
    assert len(both_ends(folders[1], 2)) == 2


def test_ranks_that_do_not_come(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_SECONDS", 0.1)
    meeting = Meeting("127.0.0.1", 2)
    with pytest.raises(TransferError, match=r"did not come to 127\.0\.0\.1"):
        send(meeting, folders[1], described(folders[1]), "gloo", CPU, lambda: False)
    with pytest.raises(TransferError, match="did not take them"):
        send(meeting, folders[1], described(folders[1]), "gloo", CPU, lambda: True)


def test_a_tensor_that_does_not_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def is_completed(self) -> bool:
            return False

    monkeypatch.setattr(receiver, "STALL_SECONDS", 0.05)
    with pytest.raises(StalledError, match=r"norm did not come through"):
        finish(Never(), "norm")
    with pytest.raises(StalledError, match=r"not wanted"):
        finish(Never(), "norm", lambda: True)


def test_it_listens_on_one_address() -> None:
    meeting = Meeting(own_address("127.0.0.1", 80), 2)
    tables = [table.read_text() for table in Path("/proc/net").glob("tcp*")]
    lines = [line.split() for table in tables for line in table.splitlines()[1:]]
    listening = [local for _, local, _, state, *_ in lines if state == "0A" and local.endswith(f":{meeting.port:04X}")]
    assert listening == [f"0100007F:{meeting.port:04X}"]


def test_nccl_is_for_gpus_and_a_folder_must_be_whole(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rollout-transfer nccl needs a GPU"):
        ByConnection("nccl", CPU)
    with pytest.raises(CheckpointError, match="no such folder"):
        described(tmp_path / "none")
