"""Rollouts of one layout: greedy as transformers, sampled as one process, in groups, by graphs, ended early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist

from megatron_sip.errors import ConfigError
from megatron_sip.parallel.world import World
from megatron_sip.rollout.engine import Rollouts, Sampling
from megatron_sip.rollout.groups import divide, round_up
from megatron_sip.rollout.sampling import uniforms


class CountedCalls:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *positional: Any) -> Any:
        self.calls += 1
        return self.function(*positional)


class RolloutCheck:
    """What the policy of the oracle writes behind the prefixes `indices` of its pairs."""

    def __init__(self, policy: Any, world: World, folder: Path, indices: list[int]) -> None:
        self.policy, self.world, self.folder, self.indices = policy, world, folder, indices
        self.expected = torch.load(folder / "expected.pt")

    def tokens(self, samples_file: Path) -> None:
        """Greedy equals transformers; sampled tokens equal those of the first layout that wrote the file."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        prefixes = [torch.tensor(oracle.pairs()[index][0]).numpy() for index in self.indices]
        engine = MegatronEngine(self.policy, self.world, WaveLimits(prefixes=3), cuda_graph=False)
        greedy = Sampling(2, oracle.NEW_TOKENS, 0.0, 1.0, eod=0, stop_at_eod=False, seed=3)
        tokens = engine.generate(prefixes, self.indices, greedy).tokens
        wanted = self.expected["greedy"][self.indices]
        for k in range(2):
            assert torch.equal(tokens[:, k], wanted), (tokens[:, k], wanted)
        sampled = replace(greedy, num_rollouts=3, temperature=1.0, top_p=0.9)
        heard: list[tuple[int, Rollouts]] = []
        rollouts = engine.generate(prefixes, self.indices, sampled, lambda *wave: heard.append(wave))
        self.by_length(rollouts, heard, engine)
        assert int(rollouts.tokens.max()) < oracle.VOCAB
        assert not (rollouts.tokens == 0).any(), "end-of-document was sampled"
        if self.world.size == 1:
            torch.save(rollouts.tokens, samples_file)
            ending = engine.generate(prefixes, self.indices, replace(sampled, temperature=5.0, eod=7, stop_at_eod=True))
            stop = (ending.tokens == 7).any(-1)
            assert torch.equal(ending.lengths[~stop], torch.full_like(ending.lengths[~stop], oracle.NEW_TOKENS))
            self.ends(prefixes, sampled)
        else:
            self.same_samples(rollouts.tokens, torch.load(samples_file)[self.indices], sampled)
        assert engine.bypasses != self.policy.config.sequence_parallel
        engine.bypasses = False  # megatron-core runs the layers
        self.same_samples(engine.generate(prefixes, self.indices, sampled).tokens, rollouts.tokens, sampled)
        if self.world.pp_size > 1:
            self.groups(prefixes, sampled, rollouts.tokens)
        self.graphs(prefixes, sampled, rollouts.tokens)

    def by_length(self, rollouts: Rollouts, heard: list[tuple[int, Rollouts]], engine: Any) -> None:
        """Waves of three prefixes of like length: the padding of their groups, and the runs that are told."""
        lengths = [oracle.PAIRS[index][0] for index in self.indices]
        order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
        waves = [order[start : start + 3] for start in range(0, len(order), 3)]
        groups = [
            [lengths[place] for place in wave[some]] for wave in waves for some in divide(len(wave), engine.groups)
        ]
        positions = sum(len(group) * round_up(max(group), engine.multiple) for group in groups)
        assert rollouts.metrics == {"rollout/padding_share": (positions - sum(lengths), positions)}
        places = [place for first, run in heard for place in range(first, first + len(run.tokens))]
        assert places == [place for wave in waves for place in sorted(wave)]
        assert torch.equal(torch.cat([run.tokens for _, run in heard]), rollouts.tokens[places])
        assert torch.equal(torch.cat([run.lengths for _, run in heard]), rollouts.lengths[places])

    def graphs(self, prefixes: list[np.ndarray], sampled: Sampling, wanted: torch.Tensor) -> None:
        """The same tokens by CUDA graphs, in two waves; a rank without a GPU refuses them."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        limits = WaveLimits(prefixes=5)
        world = self.world
        alone = world.device.type == "cuda" and world.tp_size == world.pp_size == 1
        assert MegatronEngine(self.policy, world).cuda_graph == alone, "graphs are the default where they were seen"
        if self.world.device.type != "cuda":
            with pytest.raises(ConfigError, match="--rollout-cuda-graph needs a GPU"):
                MegatronEngine(self.policy, self.world, limits, cuda_graph=True)
            return
        engine = MegatronEngine(self.policy, self.world, limits, cuda_graph=True)
        self.same_samples(engine.generate(prefixes, self.indices, sampled).tokens, wanted, sampled)
        if self.world.is_main:
            print("CUDA graphs draw the same tokens", flush=True)

    def groups(self, prefixes: list[np.ndarray], sampled: Sampling, wanted: torch.Tensor) -> None:
        """The tokens do not hang on how many groups pass the stages, nor on which of them end early."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        # Blocks of 5 tokens: the last one is shorter. As many groups as stages, a number that does not divide the
        # prefixes, one each, and more than there are.
        for groups, wave in ((1, None), (None, None), (3, None), (8, None), (11, 5)):
            meetings: list[None] = []
            meet = partial(meetings.append, None)
            engine = MegatronEngine(self.policy, self.world, WaveLimits(wave), meet, groups, block=5)
            self.same_samples(engine.generate(prefixes, self.indices, sampled).tokens, wanted, sampled)
            waves = -(-len(prefixes) // (wave or len(prefixes)))
            assert len(meetings) == waves * -(-oracle.NEW_TOKENS // 5), "every rank meets the others equally often"
        self.ends(prefixes, sampled)

    def ends(self, prefixes: list[np.ndarray], sampled: Sampling) -> None:
        """All rows of the first prefix end with their fourth token; where it is a group, no further block has it."""
        from megatron_sip.rollout.megatron import MegatronEngine

        fourth = int(self.expected["greedy"][self.indices[0], 3])
        greedy = replace(sampled, temperature=0.0, eod=fourth)
        found = []
        for groups in (1, len(prefixes)):
            engine = MegatronEngine(self.policy, self.world, groups=groups, block=5)
            written = CountedCalls(engine._decode)
            engine._decode = written  # type: ignore[method-assign]
            found.append(engine.generate(prefixes, self.indices, replace(greedy, stop_at_eod=True)))
            ended = found[-1].lengths.amax(1).view(groups, -1).amax(1)
            # A group goes on to the end of the block of its last token; its first token needs no decoding.
            wanted = sum(min(oracle.NEW_TOKENS, 5 * -(-int(length) // 5)) - 1 for length in ended)
            assert written.calls == wanted, (written.calls, wanted, ended)
        one, each = found
        assert torch.equal(one.tokens, each.tokens)
        assert torch.equal(one.lengths, each.lengths)
        assert int(one.lengths[0].max()) <= 4
        assert int(one.lengths.max()) == oracle.NEW_TOKENS, "another group goes on"

    def spread_vocabulary(self) -> None:
        """Tokens that TP ranks draw together are those of one rank with all columns, and the same on each."""
        from megatron_sip.rollout.sampling import sample_tokens

        rows, columns, rank = 600, 150, self.world.tp_rank
        generator = torch.Generator().manual_seed(11)
        whole = 3 * torch.randn(rows, columns * self.world.tp_size, generator=generator)
        whole[:50, :columns] = -torch.inf  # no mass on the first rank
        whole[50:100, -columns:] = -torch.inf  # nor on the last
        whole[100:150] = whole[100:150].round()  # many equals
        whole[150:200] *= 1000.0
        draws = torch.rand(rows, generator=generator, dtype=torch.float64)
        draws[::20], draws[1::20] = 0.0, 1 - 2.0**-53
        own = whole[:, rank * columns : (rank + 1) * columns].to(self.world.device)
        for temperature, top_p in ((1.0, 1.0), (0.4, 1.0), (0.0, 1.0), (1.0, 0.8)):
            tokens = sample_tokens(own, draws.to(own.device), temperature, top_p, self.world.tp_group).cpu()
            differing = tokens != sample_tokens(whole, draws, temperature, top_p)
            if temperature:
                steps = torch.softmax(whole.double() / temperature, dim=1).cumsum(1)
                distance = (steps - draws[:, None]).abs().amin(1)[differing]
                assert not distance.numel() or float(distance.max()) < 1e-6
                # A draw at the end may fall on either of tokens that have hardly any mass.
                differing = differing & (draws > 0) & (draws < 1 - 1e-12)
            assert int(differing.sum()) <= (1 if temperature else 0)
            least, most = tokens.clone(), tokens.clone()
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.world.control_group)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.world.control_group)
            assert torch.equal(least, most)

    def same_samples(self, tokens: torch.Tensor, wanted: torch.Tensor, sampling: Sampling) -> None:
        """Equal to those of one process, except where a first difference lies at a boundary."""
        differing = [place for place in np.ndindex(*tokens.shape[:2]) if not torch.equal(tokens[place], wanted[place])]
        for row, k in differing:
            first = int((tokens[row, k] != wanted[row, k]).nonzero()[0])
            ids = [*oracle.pairs()[self.indices[row]][0], *wanted[row, k, :first].tolist()]
            draw = float(uniforms(sampling.seed, self.indices[row], k, first + 1)[first])
            distance = oracle.boundary_distance(self.folder / "policy", ids, draw, sampling.top_p)
            assert distance < 1e-4, (
                f"pair {self.indices[row]}, rollout {k}, token {first}: differs, {distance:.1e} away"
            )
        if self.world.is_main:
            print(f"sampled rows that differ at a boundary: {len(differing)} of {wanted[..., 0].numel()}", flush=True)
