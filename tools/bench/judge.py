"""Measure what judging costs.

    python tools/bench/judge.py --client-only [--in-flight 1 64 1024] [--calls 4000] [--json FILE]

--client-only runs against a server that answers at once, and needs no other: what is measured is the client alone. One
core is the client's and one the server's where the machine has two. Exit status 0 and a table; 1 and the cause.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron_sip.errors import SipError
from tools.bench.judge_client import DEPTHS, measure, table


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client-only", action="store_true", required=True, help="the client against a fake server")
    parser.add_argument("--depth", nargs="+", choices=DEPTHS, default=DEPTHS, help="how much of the way of a verdict")
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 64, 1024], help="calls under way at a time")
    parser.add_argument("--calls", type=int, default=4000, help="calls of one measurement (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    if min(*args.in_flight, args.calls) < 1:
        print("bench/judge: --in-flight and --calls must be at least 1", file=sys.stderr)
        return 1
    try:
        costs = measure(args.depth, args.in_flight, args.calls)
    except (SipError, RuntimeError) as error:
        print(f"bench/judge: {error}", file=sys.stderr)
        return 1
    print(table(costs))
    if args.json is not None:
        args.json.write_text(json.dumps({"client": [asdict(cost) for cost in costs]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
