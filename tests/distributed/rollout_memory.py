"""What a wave of rollouts takes on a rank, against what is predicted of it, and waves planned by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.errors import ConfigError
from megatron_sip.parallel.world import World
from megatron_sip.rollout.engine import Rollouts, Sampling
from tools.bench.live_bytes import LiveBytes

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=320,
    num_attention_heads=8,
    num_query_groups=4,
    max_position_embeddings=2048,
    rotary_base=10000.0,
    norm_epsilon=1e-5,
    untie_embeddings_and_output_weights=True,
    vocab_size=1999,
)
SAMPLING = Sampling(1, 2, 1.0, 1.0, eod=0, stop_at_eod=False, seed=3)
# Prefixes, their length, and sampling: what fills the memory is the prefill, the caches, logits, a sorted vocabulary.
CASES = {
    "prefill": (2, 256, SAMPLING),
    "caches": (4, 32, replace(SAMPLING, num_rollouts=16, max_new_tokens=32, temperature=0.0)),
    "logits": (4, 16, replace(SAMPLING, num_rollouts=32)),
    "nucleus": (4, 16, replace(SAMPLING, num_rollouts=32, top_p=0.9)),
}
BELOW, ABOVE = 0.04, 0.15
"""How far a prediction may lie below and above what is allocated, as shares of it. Too little is what hurts."""


class Heard:
    """What an engine tells."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.lines: list[str] = []
        self.boundaries = 0

    def wave(self, first: int, rollouts: Rollouts) -> None:
        assert first == sum(self.sizes)
        self.sizes.append(len(rollouts.tokens))

    def boundary(self) -> None:
        self.boundaries += 1


class MemoryCheck:
    """A policy large enough that its tensors count, at the layout of this launch."""

    def __init__(self, config: Config, world: World) -> None:
        from megatron_sip.model.build import build_policy

        self.world = world
        self.policy = build_policy(replace(config, model=MODEL), world)

    def predictions(self) -> None:
        """Within the limits on the rank that has most."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_memory import WaveShape, wave_bytes
        from megatron_sip.rollout.wave_plan import stage_sizes

        for name, (count, length, sampling) in CASES.items():
            engine = MegatronEngine(self.policy, self.world, cuda_graph=self.world.device.type == "cuda")
            prefixes = [np.full(length - place % 2, 7) for place in range(count)]
            with LiveBytes() as seen:
                engine.generate(prefixes, range(count), sampling)
            shape = WaveShape(
                width=length,
                rollouts=sampling.num_rollouts,
                tokens=sampling.max_new_tokens,
                pipelined=engine.groups,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
            )
            box = torch.tensor([seen.peak, wave_bytes(stage_sizes(self.policy), shape, count).peak]).double()
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.world.control_group)
            allocated, predicted = box.tolist()
            told = f"{name}: {predicted / 1e6:.2f} MB predicted, {allocated / 1e6:.2f} MB allocated"
            if self.world.is_main:
                print(told, flush=True)
            assert (1 - BELOW) * allocated <= predicted <= (1 + ABOVE) * allocated, told

    def waves(self) -> None:
        """The largest wave that fits on every rank, the same everywhere; one that fits nowhere is refused by name."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import GIB, WaveLimits

        # The last data parallel rank has the longest prefixes, so that it bounds the waves of all.
        longest = 20 + 10 * self.world.dp_rank
        prefixes = [np.full(longest, place + 1) for place in range(7)]
        one = MegatronEngine(self.policy, self.world, groups=1).generate(prefixes, range(7), SAMPLING)
        for most, sizes in ((7, [7]), (4, [4, 3]), (3, [3, 3, 1]), (1, [1] * 7)):
            limits = WaveLimits(gib=self.bytes_of(most, 20 + 10 * (self.world.dp_size - 1)) / GIB)
            heard = Heard()
            engine = MegatronEngine(self.policy, self.world, limits, heard.boundary, groups=1, say=heard.lines.append)
            tokens = engine.generate(prefixes, range(7), SAMPLING, heard.wave).tokens
            assert torch.equal(tokens, one.tokens)
            assert heard.sizes == sizes, (most, heard.sizes)
            assert heard.boundaries == len(sizes)
            engine.generate(prefixes, range(7), SAMPLING)
            assert len(heard.lines) == 1, heard.lines
            assert heard.lines[0].startswith(f"rollouts in {len(sizes)} wave"), heard.lines
        with pytest.raises(ConfigError, match="--rollout-memory-gib is 1e-06; raise"):
            MegatronEngine(self.policy, self.world, WaveLimits(gib=1e-6)).generate(prefixes, range(7), SAMPLING)

    def bytes_of(self, prefixes: int, width: int) -> float:
        """Of a wave of so many, on the rank that needs most."""
        from megatron_sip.rollout.wave_memory import WaveShape, wave_bytes
        from megatron_sip.rollout.wave_plan import stage_sizes

        shape = WaveShape(width, SAMPLING.num_rollouts, SAMPLING.max_new_tokens)
        box = torch.tensor(wave_bytes(stage_sizes(self.policy), shape, prefixes).peak, dtype=torch.float64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.world.control_group)
        return float(box)
