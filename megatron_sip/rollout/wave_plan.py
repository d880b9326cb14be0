"""How many prefixes are rolled out together: what fits a budget of memory on every rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sip.errors import ConfigError
from megatron_sip.model.policy import PolicyModel
from megatron_sip.parallel.world import World
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.wave_memory import StageSizes, WaveShape, even_wave, most_prefixes, wave_bytes
from megatron_sip.types import TokenArray

GIB = 2**30
FREE_SHARE = 0.8
"""Of a GPU's free memory that a wave may take unasked; the rest is for what no formula counts, as workspaces."""


@dataclass(frozen=True)
class WaveLimits:
    """What bounds a wave: `prefixes` of one data parallel rank, and `gib` of one rank's memory.

    With neither, a wave may take `FREE_SHARE` of what is free on a GPU when the rollouts begin, and has no bound on a
    CPU.
    """

    prefixes: int | None = None
    gib: float | None = None


def stage_sizes(policy: PolicyModel) -> StageSizes:
    """The sizes of this rank's part of the policy."""
    config, tp = policy.config, policy.config.tensor_model_parallel_size
    return StageSizes(
        layers=len(policy.decoder.layers),
        hidden=config.hidden_size,
        heads=config.num_attention_heads // tp,
        groups=config.num_query_groups // tp,
        head_width=config.kv_channels,
        ffn=config.ffn_hidden_size // tp,
        columns=policy.vocab_size // tp if policy.post_process else 0,
        tp=tp,
        element=config.params_dtype.itemsize,
    )


class WavePlanner:
    """Plans the waves of each call of an engine. `groups` of a wave pass the pipeline; `say` hears of the plan."""

    def __init__(
        self, policy: PolicyModel, world: World, limits: WaveLimits, groups: int, say: Callable[[str], None]
    ) -> None:
        self._sizes = stage_sizes(policy)
        self._world = world
        self._limits = limits
        self._groups = groups
        self._say = say
        self._most_waves = 0

    def wave(self, prefixes: Sequence[TokenArray], sampling: Sampling) -> int:
        """Prefixes of a wave; the same on all ranks, which call it together with as many prefixes each.

        The waves are as few as fit, and as equal as they can be.

        Raises:
            ConfigError: not even one prefix fits on a rank; on all ranks alike.
        """
        most = min(self._limits.prefixes or len(prefixes), len(prefixes))
        budget = self._budget()
        if budget is None:
            return most
        shape = WaveShape(
            width=max(map(len, prefixes)),
            rollouts=sampling.num_rollouts,
            tokens=sampling.max_new_tokens,
            pipelined=self._groups,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        one = wave_bytes(self._sizes, shape, 1).peak
        fits, needed, budget = self._agree(most_prefixes(self._sizes, shape, budget, most), one, budget)
        if fits == 0:
            raise ConfigError(self._no_room(needed, budget))
        size = even_wave(len(prefixes), fits)
        self._report(-(-len(prefixes) // size), size, wave_bytes(self._sizes, shape, size).peak, budget)
        return size

    def _budget(self) -> float | None:
        """Bytes that a wave may take on this rank; None: it has no bound."""
        if self._limits.gib is not None:
            return self._limits.gib * GIB
        device = self._world.device
        if self._limits.prefixes is not None or device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        # What torch has taken and does not use is free for it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return FREE_SHARE * (free + kept)

    def _agree(self, fits: int, needed: float, budget: float) -> tuple[int, float, float]:
        """The smallest wave, the largest need of one prefix and the smallest budget of all ranks.

        All data parallel ranks must have the same number of waves, since they meet at the boundaries within them.
        """
        box = torch.tensor([-fits, needed, -budget], dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self._world.control_group)
        fewest, most, least = box.tolist()
        return int(-fewest), most, -least

    def _no_room(self, needed: float, budget: float) -> str:
        limit = (
            f"{FREE_SHARE:.0%} of the free memory is {budget / GIB:.3g} GiB"
            if self._limits.gib is None
            else f"--rollout-memory-gib is {self._limits.gib:g}"
        )
        more = "give more with" if self._limits.gib is None else "raise"
        return (
            f"the rollouts of one prefix need {needed / GIB:.3g} GiB on a rank, and {limit}; {more} "
            "--rollout-memory-gib, lower --num-rollouts, --suffix-length or --max-prefix-length, or raise "
            "--tensor-model-parallel-size or --pipeline-model-parallel-size"
        )

    def _report(self, waves: int, size: int, peak: float, budget: float) -> None:
        """Tell of the first plan, and of each that has more waves than any before."""
        if waves > self._most_waves:
            self._most_waves = waves
            self._say(
                f"rollouts in {waves} wave{'s' if waves > 1 else ''} of up to {size} prefixes on a data parallel rank: "
                f"{peak / GIB:.3g} GiB of {budget / GIB:.3g}"
            )
