"""The policy's rollouts on a server beside its own, with weights that change; the server is somebody else's.

torchrun check_rollout_server.py CASES.json

CASES.json: [{"argv", "port"}], of runs with `--rollout-engine vllm` and `--load` of a Hugging Face folder, one after
another in the same ranks; every case meets at a port of its own. Greedy rollouts of both
engines are equal, except where the two likeliest tokens are nearly as likely as each other; sampled ones come twice the
same from a server that is idle, and stay within the rules.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from megatron_sip.checkpoint.hf import export_hf, load_hf_weights
from megatron_sip.config.cli import parse_config
from megatron_sip.model.build import build_policy, first_layer
from megatron_sip.parallel import world as world_module
from megatron_sip.parallel.leader import Leader
from megatron_sip.parallel.world import World
from megatron_sip.rollout.engine import Rollouts, Sampling
from megatron_sip.rollout.megatron import MegatronEngine
from megatron_sip.rollout.vllm import VllmEngine
from megatron_sip.training.assemble import with_model
from megatron_sip.training.faults import start_watch

PREFIXES = 4
NEAR = 1e-3
"""Two logits that the arithmetic of two implementations in float32 may exchange."""


def prefixes_of(world: World, vocab_size: int) -> tuple[list[np.ndarray], list[int]]:
    """This replica's prefixes of 8 to 40 tokens, without the EOD 0, and their sample indices."""
    draw = np.random.default_rng(17)
    all_of_them = [draw.integers(1, vocab_size, size=int(draw.integers(8, 41))) for _ in range(PREFIXES)]
    mine = list(range(world.dp_rank, PREFIXES, world.dp_size))
    return [all_of_them[index] for index in mine], mine


def gap(model: LlamaForCausalLM, ids: list[int]) -> float:
    """Between the two likeliest next tokens, EOD aside."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    logits[0] = float("-inf")
    best, next_best = logits.topk(2).values.tolist()
    return best - next_best


class Check:
    """Both engines on one policy."""

    def __init__(self, argv: list[str], watch: object, world: World) -> None:
        self.config = with_model(parse_config(argv), _TokenizerOfSize(320))
        self.world = world
        self.policy = build_policy(self.config, world)
        load_hf_weights(
            self.config.checkpoint.load,
            dict(self.policy.named_parameters()),
            self.config.model,
            tp_rank=world.tp_rank,
            tp_size=world.tp_size,
            first_layer=first_layer(self.policy),
        )
        self.own = MegatronEngine(self.policy, world)
        self.server = VllmEngine(self.policy, self.config, world, Leader(world, watch))
        self.vocab_size = int(self.config.model.vocab_size)
        self.prefixes, self.indices = prefixes_of(world, self.vocab_size)

    def run(self) -> None:
        greedy = Sampling(2, 8, 0.0, 1.0, eod=0, stop_at_eod=False, seed=3)
        first, near = self.greedy(greedy)
        self.sampled(replace(greedy, num_rollouts=3, temperature=1.0, top_p=0.9))
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(0.9)
                if parameter.dim() > 1:
                    parameter[::2].mul_(-1.0)
        second, more = self.greedy(greedy)
        differing = int((first.tokens[:, 0] != second.tokens[:, 0]).any(-1).sum())
        assert differing == len(self.prefixes), "the change of the weights shows in every continuation"
        # So small a step that no log-probability tells it: the checksums must.
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(1 + 1e-6)
        self.greedy(greedy)
        self.server.close()
        if self.world.is_main:
            print(f"rows that differ where two tokens are as likely: {near + more}", flush=True)

    def greedy(self, sampling: Sampling) -> tuple[Rollouts, int]:
        mine = self.own.generate(self.prefixes, self.indices, sampling)
        waves: list[tuple[int, Rollouts]] = []
        served = self.server.generate(self.prefixes, self.indices, sampling, lambda *wave: waves.append(wave))
        waves.sort(key=lambda wave: wave[0])
        assert torch.equal(torch.cat([wave.tokens for _, wave in waves]), served.tokens)
        assert torch.equal(torch.cat([wave.lengths for _, wave in waves]), served.lengths)
        assert torch.equal(served.lengths, mine.lengths)
        assert torch.equal(served.tokens[:, 0], served.tokens[:, 1])
        if self.world.is_main:
            print({name: round(value / count, 3) for name, (value, count) in served.metrics.items()}, flush=True)
        differing = [row for row in range(len(self.prefixes)) if not torch.equal(mine.tokens[row], served.tokens[row])]
        if differing:
            self.are_near(mine, served, differing)
        return mine, len(differing)

    def are_near(self, mine: Rollouts, served: Rollouts, differing: list[int]) -> None:
        """Each first difference is at two tokens that are as likely."""
        with tempfile.TemporaryDirectory() as folder:
            model = self.exported(Path(folder) / "hf")
            for row in differing:
                one, other = mine.tokens[row, 0], served.tokens[row, 0]
                place = int((one != other).nonzero()[0])
                distance = gap(model, [*self.prefixes[row].tolist(), *one[:place].tolist()])
                assert distance < NEAR, f"row {row} differs at token {place}, {distance:.1e} apart: {one} {other}"
            torch.distributed.barrier(group=self.world.model_parallel_group)

    def exported(self, folder: Path) -> LlamaForCausalLM:
        """This replica's policy in transformers, on every rank."""
        group = self.world.model_parallel_group
        path = [folder]
        torch.distributed.broadcast_object_list(path, src=self.world.leader_rank, group=group)
        parameters = dict(self.policy.named_parameters())
        place = {"tp_rank": self.world.tp_rank, "first_layer": first_layer(self.policy)}
        export_hf(path[0], parameters, self.config.model, group=group, **place)
        return LlamaForCausalLM.from_pretrained(path[0], local_files_only=True)

    def sampled(self, sampling: Sampling) -> None:
        once, again = (self.server.generate(self.prefixes, self.indices, sampling) for _ in range(2))
        same = float((once.tokens == again.tokens).all(-1).float().mean())
        if self.world.is_main:
            print(f"sampled rows that came twice the same: {same:.2f}", flush=True)
        assert torch.equal(once.lengths, torch.full_like(once.lengths, sampling.max_new_tokens))
        assert int(once.tokens.min()) > 0
        assert int(once.tokens.max()) < self.vocab_size
        assert len({tuple(row.tolist()) for row in once.tokens.flatten(0, 1)}) == once.lengths.numel()
        ending = replace(sampling, stop_at_eod=True, eod=int(once.tokens[0, 0, 2]))
        ended = self.server.generate(self.prefixes, self.indices, ending)
        for row, length in zip(ended.tokens.flatten(0, 1).tolist(), ended.lengths.flatten().tolist(), strict=True):
            assert (ending.eod in row[:length]) == (row[length - 1] == ending.eod)
            assert length == sampling.max_new_tokens or row[length - 1] == ending.eod
            assert not any(row[length:])
        assert int(ended.lengths.min()) < sampling.max_new_tokens, "some row ends at its EOD"


class _TokenizerOfSize:
    """All that a model needs to know of a tokenizer."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size


def main() -> None:
    for case in json.loads(Path(sys.argv[1]).read_text()):
        # Without torchrun's own store each case makes its own, so no key of the case before is found in it.
        os.environ.update(MASTER_PORT=str(case["port"]), TORCHELASTIC_USE_AGENT_STORE="False")
        config = parse_config(case["argv"])
        with start_watch(config) as watch:
            world = world_module.start(config, watch.join)
            try:
                Check(case["argv"], watch, world).run()
            finally:
                world_module.stop()


if __name__ == "__main__":
    main()
