"""Start of the process groups: device and backend are chosen here, once, and nowhere else."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_sip.config.groups import Config
from megatron_sip.config.timeouts import stage_timeouts
from megatron_sip.errors import ConfigError
from megatron_sip.parallel import cpu
from megatron_sip.parallel.meeting import Meeting, meet


@dataclass(frozen=True)
class World:
    """This process's place. Groups are torch process groups; ranks in `*_rank` are positions in them."""

    rank: int
    size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_parallel_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    """gloo over all ranks, on the main thread only: waiting, skipping and stopping are decided here."""

    @property
    def is_leader(self) -> bool:
        """The one rank of its model-parallel group that talks HTTP."""
        return self.tp_rank == 0 and self.pp_rank == 0

    @property
    def is_main(self) -> bool:
        """The one rank that prints and writes logs."""
        return self.rank == 0

    @property
    def first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Holds the LM head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def leader_rank(self) -> int:
        """Global rank of this model-parallel group's leader."""
        return min(dist.get_process_group_ranks(self.model_parallel_group))

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage in this rank's pipeline."""
        return dist.get_process_group_ranks(self.pp_group)[-1]


def _free_port() -> int:
    """A port of this machine, for a run of one process without torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _choose_device(config: Config) -> tuple[torch.device, str]:
    """Device of this rank and the collective backend that goes with it."""
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_size > torch.cuda.device_count():
            raise ConfigError(
                f"this node runs {local_size} ranks and has {torch.cuda.device_count()} GPUs; "
                "lower GPUS_PER_NODE (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank), "nccl"
    torch.set_num_threads(config.training.num_threads)
    return torch.device("cpu"), "gloo"


def group_timeout(config: Config) -> timedelta:
    """Longer than any stage may take, so that the watch over the stages says who is at fault.

    Ranks wait for a slow one in the collectives of every group, in loads and saves too.
    """
    longest = max(stage_timeouts(config.parallel.stage_timeout).values())
    return timedelta(seconds=max(longest + 60, 60 * config.parallel.distributed_timeout_minutes))


def start(config: Config, on_meeting: Callable[[Meeting], None] | None = None) -> World:
    """Join the process groups that `config.parallel` asks for. Settings are validated before this is called.

    `on_meeting` hears of it as soon as the ranks have found each other, if there is more than one.

    Raises:
        ConfigError: more ranks than GPUs on this node.
        SipError: a rank did not come.
    """
    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    timeout = group_timeout(config)
    meeting = meet(60.0 * config.parallel.distributed_timeout_minutes)
    if on_meeting and meeting.size > 1:
        on_meeting(meeting)
    device, backend = _choose_device(config)
    # A device id lets nccl connect at once; gloo takes none.
    device_id = device if backend == "nccl" else None
    dist.init_process_group(
        backend, timeout=timeout, device_id=device_id, store=meeting.store, rank=meeting.rank, world_size=meeting.size
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.parallel.pipeline_model_parallel_size,
        context_parallel_size=config.parallel.context_parallel_size,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    # As in Megatron: stages draw different weights, the ranks of one stage parts of the same.
    seed = config.training.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        model_parallel_group=parallel_state.get_model_parallel_group(),
        control_group=dist.new_group(backend="gloo", timeout=timeout),
    )


def stop() -> None:
    """Leave all process groups, if any was joined."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
