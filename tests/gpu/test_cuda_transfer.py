"""Weights that go to a rollout server by nccl, from GPU to GPU, with the receiver in a process of its own."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from fake_rollouts import Worker, make_llama
from torch import multiprocessing

from megatron_sip.checkpoint.safetensors_io import SafetensorsFolder
from megatron_sip.rollout.delivery import described
from megatron_sip.rollout.receiver import Tensors
from megatron_sip.rollout.transfer import Meeting, TransferError, send

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SENDER, RECEIVER = torch.device("cuda:0"), torch.device("cuda:1")


class DyingWorker(Worker):
    """Its process is gone when the tensor `falls_at` has come."""

    def reload_weights(self, weights_iterator: object) -> None:
        try:
            super().reload_weights(weights_iterator)
        except RuntimeError:
            os._exit(1)


def receive(port: int, token: str, tensors: Tensors, falls_at: str | None, out: Connection) -> None:
    """The server's process."""
    torch.cuda.set_device(RECEIVER)
    worker = DyingWorker(0, 1, falls_at)
    worker.device = RECEIVER
    told = worker.receive_policy_weights("127.0.0.1", port, token, "nccl", tensors)
    assert told == {"fault": None, "left": 0}
    out.send({name: tensor.cpu().numpy() for name, tensor in worker.tensors.items()})


@pytest.mark.parametrize("falls_at", [None, "model.layers.1.mlp.up_proj.weight"])
def test_every_bit_comes_through_and_a_dead_receiver_ends_the_sender(tmp_path: Path, falls_at: str | None) -> None:
    folder = make_llama(tmp_path / "hf", hidden_size=256, intermediate_size=1024)
    tensors, meeting = described(folder), Meeting("127.0.0.1", 2)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=receive, args=(meeting.port, meeting.token, tensors, falls_at, there))
    process.start()
    try:
        if falls_at is not None:
            with pytest.raises(TransferError):
                send(meeting, folder, tensors, "nccl", SENDER, lambda: False)
            return
        send(meeting, folder, tensors, "nccl", SENDER, lambda: not process.is_alive())
        assert here.poll(60)
        got = here.recv()
        with SafetensorsFolder(folder) as source:
            assert got.keys() == source.names
            assert all((source.lazy(name)[:].numpy() == value).all() for name, value in got.items())
    finally:
        process.join(60)
        assert process.exitcode == (0 if falls_at is None else 1)
