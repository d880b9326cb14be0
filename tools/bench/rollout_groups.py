"""Rollouts under pipeline parallel with one group of rows and with several, in turn in one run.

torchrun --nproc-per-node 2 tools/bench/rollout_groups.py --prefix 512 --k 16 --suffix 32 --batch 8 --groups 1 2

One process a stage, one thread each, a random Llama of 9.6M parameters. Besides the time of the wall it tells the
processor seconds of the ranks: their sum is the least time in which stages work one after the other, the largest the
least in which they work side by side, whatever else the machine does meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.groups import Config, ParallelConfig
from megatron_sip.config.numbers import whole_number
from megatron_sip.config.presets import with_preset
from megatron_sip.cost.sizes import model_sizes
from megatron_sip.parallel import world as world_module
from megatron_sip.rollout.engine import Sampling
from tools.bench.machine import load_average
from tools.bench.step_inputs import random_cuts
from tools.bench.step_spec import DEFAULT_MODEL, Point
from tools.bench.turns import as_json, in_turn


class GroupBench:
    """One stage of the policy."""

    def __init__(self, point: Point) -> None:
        stages = int(os.environ.get("WORLD_SIZE", "1"))
        config = Config(model=with_preset(DEFAULT_MODEL), parallel=ParallelConfig(pipeline_model_parallel_size=stages))
        self.world = world_module.start(config)
        from megatron_sip.model.build import build_policy

        self.policy = build_policy(config, self.world)
        self.prefixes = [cut.prefix for cut in random_cuts(point, model_sizes(DEFAULT_MODEL).vocab_size, 0, 1)]
        self.sampling = Sampling(point.rollouts, point.suffix, 1.0, 1.0, eod=0, stop_at_eod=False, seed=1)

    def generate(self, groups: int) -> None:
        """All rollouts once."""
        from megatron_sip.rollout.megatron import MegatronEngine

        engine = MegatronEngine(self.policy, self.world, groups=groups)
        engine.generate(self.prefixes, range(len(self.prefixes)), self.sampling)


def main(argv: list[str] | None = None) -> int:
    """Run the bench; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    one = whole_number(1)
    for name, default, text in (
        ("prefix", 512, "tokens of a prefix"),
        ("suffix", 32, "tokens of a rollout"),
        ("k", 16, "rollouts of a prefix"),
        ("batch", 8, "prefixes"),
        ("repeats", 3, "times that all numbers of groups are run in turn"),
    ):
        parser.add_argument(f"--{name}", type=one, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--groups", type=one, nargs="+", default=[1, 2], help="numbers of groups (default: 1 2)")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=UserWarning)
    bench = GroupBench(Point(options.prefix, options.suffix, options.k, options.batch))
    before, works = load_average(), {f"groups {groups}": partial(bench.generate, groups) for groups in options.groups}
    found = in_turn(works, options.repeats, bench.world.control_group)
    if bench.world.is_main:
        for name, timings in found.items():
            figures, walls = as_json(timings), ", ".join(f"{timing.wall:.2f}" for timing in timings)
            print(
                f"{name}: {figures['seconds']:.2f} s ({walls}); processor: {figures['processor_seconds']:.2f} s in "
                f"sum, {figures['busiest_rank_seconds']:.2f} s on the busiest rank",
                flush=True,
            )
        print(f"load average: {before:.1f} before, {load_average():.1f} after")
    world_module.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
