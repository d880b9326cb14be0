"""Time steps of many sizes: against K, the prefix, the batch, the layout of the ranks, or the judge's latency.

python tools/bench/step_sweep.py --sweep k prefix batch layout --json sweep.json --svg docs/step.svg
python tools/bench/step_sweep.py --sweep judge --prefix 256 --json judge.json

What a sweep does not vary is at --prefix, --suffix, --k and --batch. The latencies of the sweep "judge" are multiples
of the policy's own time at that size, which is measured first, and again in each repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.numbers import amount, whole_number
from megatron_sip.cost.sizes import model_sizes
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.evaluation.line_plot import draw
from tools.bench import machine
from tools.bench.step_curves import panel, sweep_table
from tools.bench.step_measure import Bench
from tools.bench.step_options import add_flags, point_of, spec_of, surroundings
from tools.bench.step_report import Result, as_json, machine_line, warnings_of
from tools.bench.step_spec import Point, Spec

_WIDTH = 160
"""Columns of a table that is written to a file."""
SWEEPS = ("k", "prefix", "batch", "layout", "judge")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, required=True, help="what is varied, one at a time")
    for name, values in (("k", [1, 2, 4, 8, 16]), ("prefix", [128, 256, 512, 1024, 1920]), ("batch", [1, 2, 4, 8, 16])):
        shown = " ".join(map(str, values))
        parser.add_argument(
            f"--{name}-values", nargs="+", type=whole_number(1), default=values, help=f"default: {shown}"
        )
    layouts = ["1x1", "2x1", "1x2", "2x2"]
    parser.add_argument("--layout-values", nargs="+", default=layouts, help="TPxPP; default: 1x1 2x1 1x2 2x2")
    shares = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0]
    parser.add_argument(
        "--judge-values", nargs="+", type=amount, default=shares, help="times the policy's time; default: 0.1 to 4"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--svg", type=Path, help="draw a panel for each sweep here")
    return parser


def layout_of(text: str) -> tuple[int, int]:
    """TP and PP of "2x1". ConfigError for anything else."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ConfigError(f"--layout-values {text}: a layout is TPxPP, such as 2x1")
    return int(parts[0]), int(parts[1])


def beside_alone(results: Sequence[Result]) -> list[Result]:
    """The points of the sweep "judge" with the policy's own work, which is the first of them: its judge is instant."""
    policy = tuple(sample.seconds for sample in results[0].sip)
    return [replace(result, policy=policy) for result in results]


class Sweep:
    """Measures the points of one sweep after the other; the arms of one layout are started once."""

    def __init__(self, options: argparse.Namespace, spec: Spec) -> None:
        self._options, self._spec = options, spec
        self._base = point_of(options)
        self.rates: dict[str, float] = {}
        self.gpu: str | None = None

    def results(self) -> dict[str, list[Result]]:
        """By the name of the sweep; at equal sizes a point is measured again. SipError where an arm fails."""
        found: dict[str, list[Result]] = {}
        sizes = [name for name in self._options.sweep if name != "layout"]
        if sizes:
            with self._bench(self._spec) as bench:
                for name in sizes:
                    found[name] = bench.measure(self._points(name, bench), self._options.repeats)
                self._note(bench)
        if "judge" in found:
            found["judge"] = beside_alone(found["judge"])
        if "layout" in self._options.sweep:
            found["layout"] = []
            for text in self._options.layout_values:
                with self._bench(self._spec.with_layout(*layout_of(text))) as bench:
                    found["layout"] += bench.measure([self._base], self._options.repeats)
                    self._note(bench)
        return {name: [self._at_best_rate(result) for result in results] for name, results in found.items()}

    def _at_best_rate(self, result: Result) -> Result:
        """With the floor of the best rate of the whole sweep: that of one device does not depend on the point."""
        devices = result.tensor * result.pipeline if self.gpu else 1
        return replace(result, rate=devices * max(self.rates.values()))

    def _points(self, name: str, bench: Bench) -> list[Point]:
        if name == "judge":
            alone = bench.measure([replace(self._base, judge_seconds=0.0)], 1)[0]
            policy = statistics.median(sample.seconds for sample in alone.sip)
            shares = (0.0, *self._options.judge_values)
            return [replace(self._base, judge_seconds=share * policy) for share in shares]
        field = {"k": "rollouts"}.get(name, name)
        values: list[int] = getattr(self._options, f"{name}_values")
        return [replace(self._base, **{field: value}) for value in values]

    def _bench(self, spec: Spec) -> Bench:
        options = self._options
        return Bench(spec, options.compare, save=not options.no_save, steps=options.steps, say=_say)

    def _note(self, bench: Bench) -> None:
        self.gpu = bench.gpu
        for size, rate in bench.matmul_rates.items():
            self.rates[size] = max(rate, self.rates.get(size, 0.0))


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure, print, write. SipError where that fails."""
    load, spec = machine.load_average(), spec_of(options)
    for text in options.layout_values:
        layout_of(text)
    sizes = model_sizes(spec.model)
    sweep = Sweep(options, spec)
    found = sweep.results()
    around: dict[str, Any] = surroundings(spec, sizes, sweep.gpu, load)
    around["matmul_flops_per_second"] = sweep.rates
    points = {name: [as_json(sizes, result) for result in results] for name, results in found.items()}
    if options.json:  # first, for nothing else of a long measurement would be left if the rest failed
        options.json.write_text(json.dumps({**around, "sweeps": points}, indent=1) + "\n")
    for name, results in found.items():
        console.print(sweep_table(name, sizes, results))
    console.print(machine_line(around, sweep.rates), highlight=False, soft_wrap=True)
    for warning in warnings_of([result for results in found.values() for result in results], load):
        console.print(f"WARNING: {warning}", highlight=False, soft_wrap=True)
    if options.svg:
        options.svg.write_text(draw([panel(name, values) for name, values in points.items()]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        run(options, Console() if sys.stdout.isatty() else Console(width=_WIDTH))
    except (SipError, OSError) as error:
        print(f"step_sweep: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
