"""Measure judging: `server`, what verdicts cost on a real server; `client`, what the client alone can do.

    python tools/bench/judge.py server --judge-url http://127.0.0.1:8100/v1 --text data/demo/held_out.jsonl

The parts are the files judge_<part>.py beside this one; the flags of each:
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def parts() -> dict[str, Any]:
    """The modules of all parts by name."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("judge_*.py"))
    return {name.removeprefix("judge_"): importlib.import_module(f"tools.bench.{name}") for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    known = parts()
    if words and words[0] in known:
        status: int = known[words[0]].main(words[1:])
        return status
    helped = words[:1] in (["-h"], ["--help"])
    text = [__doc__ or "", *(f"{name}:\n{module.build_parser().format_help()}" for name, module in known.items())]
    print("\n".join(text) if helped else f"judge: the first word must be one of {', '.join(known)}, or --help")
    if helped:
        raise SystemExit(0)
    return 2


if __name__ == "__main__":
    sys.exit(main())
