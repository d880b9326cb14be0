"""Time a step and its parts, against what the arithmetic demands and against the same step with transformers.

python tools/bench/step.py --prefix 1024 --suffix 128 --k 16 --batch 4 --compare hf unshared --json step.json
python tools/bench/step.py --prefix 256 --k 16 --tensor-model-parallel-size 2 --threads 1

Each arm is a process of its own; they measure in turn, and medians are told. No server is asked.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.cost.sizes import model_sizes
from megatron_sip.errors import SipError
from tools.bench import machine, step_report
from tools.bench.step_measure import Bench
from tools.bench.step_options import add_flags, point_of, spec_of, surroundings


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    return parser


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure one point, print it and write it. SipError where an arm fails."""
    load = machine.load_average()
    spec, point = spec_of(options), point_of(options)
    sizes = model_sizes(spec.model)
    with Bench(spec, options.compare, save=not options.no_save, steps=options.steps, say=_say) as bench:
        [result] = bench.measure([point], options.repeats)
        rates = bench.matmul_rates
        around = surroundings(spec, sizes, bench.gpu, load)
    console.print(step_report.table(sizes, result))
    for remark in step_report.remarks(sizes, result):
        console.print(f"- {remark}", highlight=False, soft_wrap=True)
    console.print(step_report.machine_line(around, rates), highlight=False, soft_wrap=True)
    for warning in step_report.warnings_of([result], load):
        console.print(f"WARNING: {warning}", highlight=False, soft_wrap=True)
    if options.json:
        found = step_report.as_json(sizes, result)
        options.json.write_text(json.dumps({**around, "matmul_flops_per_second": rates, **found}, indent=1) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        run(options, Console())
    except (SipError, OSError) as error:
        print(f"step: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
