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
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.groups import Config, ParallelConfig
from megatron_sip.config.numbers import whole_number
from megatron_sip.config.presets import with_preset
from megatron_sip.cost.sizes import model_sizes
from megatron_sip.parallel import world as world_module
from megatron_sip.rollout.engine import Sampling
from tools.bench.machine import load_average
from tools.bench.matmul import synchronize
from tools.bench.step_inputs import random_cuts
from tools.bench.step_spec import DEFAULT_MODEL, Point


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

    def measure(self, groups: int) -> np.ndarray:
        """Seconds of the wall, and the processor's on each rank."""
        from megatron_sip.rollout.megatron import MegatronEngine

        engine = MegatronEngine(self.policy, self.world, groups=groups)
        dist.barrier(group=self.world.control_group)
        wall, own = time.perf_counter(), time.process_time()
        engine.generate(self.prefixes, range(len(self.prefixes)), self.sampling)
        synchronize()
        seconds = torch.tensor([time.perf_counter() - wall, time.process_time() - own], dtype=torch.float64)
        all_of = [torch.empty_like(seconds) for _ in range(self.world.size)]
        dist.all_gather(all_of, seconds, group=self.world.control_group)
        return np.array([max(float(rank[0]) for rank in all_of), *(float(rank[1]) for rank in all_of)])


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
    before, found = load_average(), {groups: [bench.measure(groups)] for groups in options.groups}
    for repeat in range(options.repeats):
        for groups in options.groups[:: -1 if repeat % 2 else 1]:
            found[groups].append(bench.measure(groups))
    if bench.world.is_main:
        for groups, (_, *measured) in found.items():  # the first one warmed up
            wall, total, largest = (
                [row[0] for row in measured],
                [sum(row[1:]) for row in measured],
                [max(row[1:]) for row in measured],
            )
            print(
                f"groups {groups}: {median(wall):.2f} s ({', '.join(f'{second:.2f}' for second in wall)}); processor: "
                f"{median(total):.2f} s in sum, {median(largest):.2f} s on the busiest rank",
                flush=True,
            )
        print(f"load average: {before:.1f} before, {load_average():.1f} after")
    world_module.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
