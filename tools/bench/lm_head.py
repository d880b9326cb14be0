"""Time the LM head by chunks of the vocabulary against all logits, and the draw of tokens against plain ways.

python tools/bench/lm_head.py --json head.json
python tools/bench/lm_head.py --positions 1024 --vocab-sizes 4096 --rows 64 --threads 1
torchrun --nproc-per-node 2 tools/bench/lm_head.py --threads 1          # the vocabulary over two ranks (TP 2)

Log-probabilities are those of the policy (`PolicyModel.logprobs`), in one chunk and in smaller ones, and by
megatron-core's product and loss over all logits ("whole"). Tokens are drawn at temperature 1 and top-p 1. Weights and
hidden states are random.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.groups import Config, ParallelConfig, TrainingConfig
from megatron_sip.config.numbers import whole_number
from megatron_sip.parallel import world as world_module
from tools.bench import head_report, machine, turns
from tools.bench.head_arms import PASSES, HeadCase, draw_works, head_works
from tools.bench.live_bytes import peak_bytes
from tools.bench.matmul import DTYPES
from tools.bench.step_spec import DEFAULT_MODEL

_LEAST_SECONDS = 0.05
"""A measurement takes at least so long; a draw alone takes less than a millisecond."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = whole_number(1)
    for name, default, text in (
        ("vocab-sizes", [4096, 32_000, 131_072], "tokens of the vocabularies"),
        ("positions", [256], "scored positions of a pass"),
        ("chunk-mib", [64, 16, 4], "MiB of logits that may exist at a time; what holds all of them is left out"),
        ("rows", [64], "rows that draw a token"),
    ):
        shown = " ".join(map(str, default))
        parser.add_argument(f"--{name}", type=one, nargs="+", default=default, help=f"{text} (default: {shown})")
    hidden = DEFAULT_MODEL.hidden_size
    parser.add_argument("--hidden-size", type=one, default=hidden, help=f"width of a position (default: {hidden})")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of weights and states (default: fp32)")
    parser.add_argument("--threads", type=one, help="CPU threads of a rank (default: cores over ranks)")
    parser.add_argument("--repeats", type=one, default=3, help="times that all arms are run in turn (default: 3)")
    parser.add_argument("--seed", type=whole_number(0), default=1, help="of weights, states and draws (default: 1)")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser


class HeadBench:
    """This rank's part of the LM heads, one vocabulary after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.threads = options.threads or max(1, (os.cpu_count() or 1) // self.ranks)
        self.world = world_module.start(self._config(max(options.vocab_sizes)))

    def _config(self, vocab_size: int) -> Config:
        """One narrow layer below the head: what is measured is above it."""
        sizes = replace(DEFAULT_MODEL, num_layers=1, hidden_size=self.options.hidden_size, vocab_size=vocab_size)
        heads = replace(sizes, num_attention_heads=self.ranks, num_query_groups=self.ranks, kv_channels=2)
        return Config(
            model=replace(heads, ffn_hidden_size=8 * self.ranks),
            parallel=ParallelConfig(tensor_model_parallel_size=self.ranks),
            training=TrainingConfig(
                bf16=self.options.dtype == "bf16", num_threads=self.threads, seed=self.options.seed
            ),
        )

    def measure(self) -> dict[str, Any]:
        """The figures of both tables, as they stand in the JSON."""
        heads, draws = [], []
        for vocab_size in self.options.vocab_sizes:
            for positions in self.options.positions:
                heads += self._heads(positions, vocab_size)
            draws += [self._draws(rows, vocab_size) for rows in self.options.rows]
        return {"heads": heads, "draws": draws}

    def _heads(self, positions: int, vocab_size: int) -> list[dict[str, Any]]:
        """A row for each kind of pass over one number of positions and one vocabulary."""
        from megatron_sip.model.build import build_policy

        policy = build_policy(self._config(vocab_size), self.world)
        case = HeadCase.random(policy, positions, self.options.seed)
        found = []
        for kind in PASSES:
            works = head_works(policy, case, self.options.chunk_mib, kind)
            arms = self._timed(works)
            for name, work in works.items():
                arms[name]["peak_bytes"] = self._largest(peak_bytes(work, self.world.device))
            row = {"positions": positions, "vocab_size": vocab_size, "pass": kind, "logits_bytes": case.logits_bytes}
            found.append({**row, "arms": arms})
        return found

    def _draws(self, rows: int, vocab_size: int) -> dict[str, Any]:
        works = draw_works(rows, vocab_size, self.world, self.options.seed)
        return {"rows": rows, "vocab_size": vocab_size, "arms": self._timed(works)}

    def _timed(self, works: Mapping[str, turns.Work]) -> dict[str, dict[str, Any]]:
        timings = turns.in_turn(works, self.options.repeats, self.world.control_group, _LEAST_SECONDS)
        return {name: turns.as_json(measured) for name, measured in timings.items()}

    def _largest(self, count: int) -> int:
        """Over the ranks."""
        box = torch.tensor(count)
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX, group=self.world.control_group)
        return int(box)


def run(options: argparse.Namespace) -> None:
    """Measure, print and write. SipError where a rank fails."""
    load = machine.load_average()
    bench = HeadBench(options)
    found = bench.measure()
    around = turns.surroundings(bench.world, load, bench.threads, options.dtype)
    around |= {"hidden_size": options.hidden_size, "seed": options.seed}
    if bench.world.is_main:
        head_report.show(Console() if sys.stdout.isatty() else Console(width=160), around, found)
        if options.json:
            options.json.write_text(json.dumps({**around, **found}, indent=1) + "\n")
    world_module.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    return turns.as_command("lm_head", partial(run, build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
