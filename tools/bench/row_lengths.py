"""Time reference and training over rows whose prefixes differ in length, put together in three ways.

python tools/bench/row_lengths.py --json rows.json
python tools/bench/row_lengths.py --prefix 128 1920 --suffix 128 --micro-batch-size 1 2 4
torchrun --nproc-per-node 2 tools/bench/row_lengths.py --threads 1                         # two stages (PP 2)

Rows of similar length in one micro-batch, each micro-batch as wide as its longest row, is what the trainer does. Beside
it: the rows in the order of the batch, each micro-batch as wide as its longest row; and all as wide as the longest row
of the batch. The model is a random Llama of 9.6M parameters; tokens are random, lengths are drawn uniformly.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.groups import Config, ParallelConfig, TrainingConfig
from megatron_sip.config.numbers import whole_number
from megatron_sip.config.presets import with_preset
from megatron_sip.errors import ConfigError
from megatron_sip.loss.reduce import GlobalCounts, local_counts
from megatron_sip.parallel import world as world_module
from megatron_sip.preference.arrange import ArrangedBatch, arrange
from megatron_sip.preference.collate import collate
from megatron_sip.preference.micro_batches import MicroRows
from megatron_sip.types import Candidate, CandidateKind, Cut, Pair, PreferenceBatch
from tools.bench import machine, turns
from tools.bench.step_spec import DEFAULT_MODEL

if TYPE_CHECKING:
    from megatron_sip.loss.segments import ReferenceLogps

SIMILAR, IN_ORDER, ONE_WIDTH = "similar length", "order of the batch", "one width"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = whole_number(1)
    parser.add_argument(
        *("--prefix",), type=one, nargs=2, default=[64, 384], help="least and most tokens of a prefix (default: 64 384)"
    )
    for name, default, text in (
        ("suffix", 64, "tokens of each of a row's two suffixes"),
        ("batch", 8, "rows"),
        ("repeats", 3, "times that all ways are run in turn"),
    ):
        parser.add_argument(f"--{name}", type=one, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--micro-batch-size", type=one, nargs="+", default=[1, 4], help="rows of a pass (default: 1 4)")
    parser.add_argument("--threads", type=one, help="CPU threads of a rank (default: cores over ranks)")
    parser.add_argument("--seed", type=whole_number(0), default=1, help="of weights, lengths and tokens (default: 1)")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser


def batch_of_lengths(lengths: Sequence[int], suffix: int, vocab_size: int, seed: int) -> PreferenceBatch:
    """Rows of random tokens with prefixes of these lengths and two suffixes of `suffix` tokens."""
    numbers, rows = np.random.default_rng([seed, 1]), []
    for index, length in enumerate(lengths):
        tokens = numbers.integers(1, vocab_size, size=length + 2 * suffix, dtype=np.int64)
        prefix, chosen, rejected = np.split(tokens, [length, length + suffix])
        first = Candidate(CandidateKind.ORIGINAL, tuple(chosen.tolist()), "")
        second = Candidate(CandidateKind.ROLLOUT, tuple(rejected.tolist()), "", 0)
        rows.append((Cut(index, index, length, prefix, chosen), Pair(first, second)))
    return collate(rows)


def ways(batch: PreferenceBatch, size: int) -> dict[str, ArrangedBatch]:
    """The rows of the batch in micro-batches of `size`, put together in three ways."""
    neighbours = [tuple(range(first, first + size)) for first in range(0, batch.rows, size)]
    lengths = batch.layout().sum(dim=1).tolist()
    own = tuple(MicroRows(rows, max(lengths[row] for row in rows)) for rows in neighbours)
    one = tuple(MicroRows(rows, batch.width) for rows in neighbours)
    return {
        SIMILAR: arrange(batch, size, shares_prefix=True),
        IN_ORDER: ArrangedBatch(batch, batch, own),
        ONE_WIDTH: ArrangedBatch(batch, batch, one),
    }


class RowBench:
    """One stage of the policy with its trainer, and the rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ranks = int(os.environ.get("WORLD_SIZE", "1"))
        self.threads = options.threads or max(1, (os.cpu_count() or 1) // self.ranks)
        config = Config(
            model=with_preset(DEFAULT_MODEL),
            parallel=ParallelConfig(pipeline_model_parallel_size=self.ranks),
            training=TrainingConfig(
                global_batch_size=options.batch, num_threads=self.threads, seed=options.seed, train_iters=1
            ),
        )
        self.world = world_module.start(config)
        from megatron_sip.model.build import build_policy
        from megatron_sip.training.step import PolicyTrainer

        self.trainer = PolicyTrainer(build_policy(config, self.world), config, self.world)
        low, high = options.prefix
        self.lengths = np.random.default_rng(options.seed).integers(low, high, options.batch, endpoint=True).tolist()
        self.batch = batch_of_lengths(self.lengths, options.suffix, config.model.vocab_size or 0, options.seed)

    def measure(self) -> list[dict[str, Any]]:
        """An entry of the JSON for each size of micro-batch and each way."""
        found = []
        counts = GlobalCounts.from_tensor(local_counts(self.batch))
        for size in self.options.micro_batch_size:
            arranged = ways(self.batch, size)
            works: dict[str, turns.Work] = {}
            for name, rows in arranged.items():
                reference = self.trainer.reference_logps(rows)
                works[f"reference {name}"] = partial(self.trainer.reference_logps, rows)
                works[f"train {name}"] = partial(self._train, rows, reference, counts)
            timings = turns.in_turn(works, self.options.repeats, self.world.control_group)
            for name, rows in arranged.items():
                padded, positions = rows.padding()
                parts = {part: turns.as_json(timings[f"{part} {name}"]) for part in ("reference", "train")}
                found.append({"micro_batch_size": size, "way": name, "padding": padded / positions, **parts})
        return found

    def _train(self, rows: ArrangedBatch, reference: ReferenceLogps | None, counts: GlobalCounts) -> None:
        """Forward and backward, without an update."""
        self.trainer.forward_backward(rows, reference, counts)


def table(points: Sequence[dict[str, Any]]) -> Table:
    """A line for each size of micro-batch and each way, with its share of the time that one width takes."""
    shown = Table(title="rows of different lengths: seconds, medians")
    for name in ("micro-batch", "rows", "padding", "reference", "train", "both", "of one width", "processor"):
        shown.add_column(name, justify="left" if name == "rows" else "right")
    for size in dict.fromkeys(point["micro_batch_size"] for point in points):
        own = {point["way"]: point for point in points if point["micro_batch_size"] == size}
        for way, point in own.items():
            both, widest = _both(point), _both(own[ONE_WIDTH])
            seconds = [f"{second:.2f}" for second in (point["reference"]["seconds"], point["train"]["seconds"], both)]
            share, processor = f"{both / widest:.2f}", f"{_both(point, 'processor_seconds'):.2f}"
            shown.add_row(str(size), way, f"{point['padding']:.3f}", *seconds, share, processor)
        shown.add_section()
    return shown


def _both(point: dict[str, Any], seconds: str = "seconds") -> float:
    return float(point["reference"][seconds] + point["train"][seconds])


def run(options: argparse.Namespace) -> None:
    """Measure, print and write. SipError where that fails."""
    _validate(options)
    load = machine.load_average()
    bench = RowBench(options)
    points = bench.measure()
    around = turns.surroundings(bench.world, load, bench.threads, "fp32")
    around |= {"prefixes": bench.lengths, "suffix": options.suffix, "seed": options.seed}
    if bench.world.is_main:
        console = Console() if sys.stdout.isatty() else Console(width=120)
        console.print(table(points))
        lengths = ", ".join(map(str, sorted(bench.lengths)))
        console.print(
            f"prefixes of {lengths} tokens, two suffixes of {options.suffix}, PP {bench.ranks}", soft_wrap=True
        )
        measured = [point[part] for point in points for part in ("reference", "train")]
        turns.show_surroundings(console, around, measured)
        if options.json:
            options.json.write_text(json.dumps({**around, "points": points}, indent=1) + "\n")
    world_module.stop()


def _validate(options: argparse.Namespace) -> None:
    """ConfigError where flags do not fit together."""
    low, high = options.prefix
    if low > high:
        raise ConfigError(f"--prefix {low} {high}: the first is the least; turn them round")
    for size in options.micro_batch_size:
        if options.batch % size:
            raise ConfigError(f"--batch {options.batch} is no multiple of --micro-batch-size {size}; change one")
    longest = DEFAULT_MODEL.max_position_embeddings or 0
    if high + options.suffix > longest:
        raise ConfigError(
            f"--prefix {high} and --suffix {options.suffix} need more than the model's {longest} positions; lower one"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    return turns.as_command("row_lengths", partial(run, build_parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
