"""Measure what checkpoints, journal and audit log cost, and how often chance alone looks like a loss spike.

python tools/bench/checkpoint.py --folder runs
python tools/bench/checkpoint.py --folder runs --parts stall --model smollm2-135m --saves 3 --json stall.json

Everything is written into a temporary folder in --folder, so on its disk, and removed again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.numbers import whole_number
from megatron_sip.errors import SipError
from tools.bench import checkpoint_files as files
from tools.bench.checkpoint_files import Row

PARTS = ("stall", "journal", "checksum", "audit", "spikes")
VOCABULARY = 8192
"""Of models without a published one."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure what checkpoints, journal and audit log cost; no server is needed."
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured (default: here)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--model", default="llama-tiny", help="stall: preset of the model that is saved")
    parser.add_argument("--ranks", type=whole_number(1), default=2, help="stall: tensor parallel size")
    parser.add_argument("--saves", type=whole_number(1), default=8, help="stall: saves of each kind")
    parser.add_argument("--width", type=whole_number(3), default=192, help="stall: tokens of each of the two pairs")
    parser.add_argument("--repeats", type=whole_number(1), default=200, help="journal, audit: writes that are timed")
    parser.add_argument("--checksum-mb", type=whole_number(1), default=512, help="checksum: size of the file")
    parser.add_argument("--spike-steps", type=whole_number(100), default=files.SPIKE_STEPS, help="spikes: steps")
    parser.add_argument("--seed", type=whole_number(0), default=1, help="seed of all that is random")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser


def stall(folder: Path, options: argparse.Namespace) -> list[Row]:
    """How long a save keeps the loop waiting, and how much slower the steps are that run beside it.

    Raises:
        SipError: the ranks failed.
    """
    spec = {name: getattr(options, name) for name in ("ranks", "saves", "width")}
    spec |= {"preset": options.model, "vocab_size": VOCABULARY, "folder": str(folder)}
    (folder / "spec.json").write_text(json.dumps(spec))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    script = Path(__file__).with_name("checkpoint_ranks.py")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        [*launch, str(script), str(folder / "spec.json")], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SipError(f"the ranks ended with {done.returncode}: {done.stderr[-3000:]}")
    result = json.loads((folder / "result.json").read_text())
    sizes = [path.stat().st_size for path in sorted(folder.glob("iter_*/*.distcp"))]
    return [_stall_row(mode, times, max(sizes)) for mode, times in result.items()]


def _stall_row(mode: str, times: dict[str, list[float]], size: int) -> Row:
    quiet, row = statistics.median(times["quiet"]), Row()
    row["save"], row["MB a rank"] = mode, round(size / 1e6)
    row["stall, ms"] = _spread(times["stall"])
    row["processor of the main thread, ms"] = _spread(times["processor"])
    row["durable after, s"] = round(statistics.median(times["durable"]), 2)
    row["step without, ms"] = round(1000 * quiet, 1)
    if times["during"]:
        row["step during, ms"] = round(1000 * statistics.median(times["during"]), 1)
        row["slowdown"] = round(statistics.median(times["during"]) / quiet, 2)
        row["steps during"] = len(times["during"])
    return row


def _spread(seconds: list[float]) -> str:
    """The first one apart: memory has to be got for it."""
    first, *rest = (1000 * one for one in seconds)
    if not rest:
        return f"{first:.0f}"
    return f"{min(rest):.0f} to {max(rest):.0f}, median {statistics.median(rest):.0f}, the first {first:.0f}"


def measured(part: str, folder: Path, options: argparse.Namespace) -> list[Row]:
    """The rows of one part."""
    if part == "stall":
        return stall(folder, options)
    if part == "journal":
        return files.journal(folder, options.repeats, options.seed)
    if part == "checksum":
        return files.checksum(folder, options.checksum_mb << 20)
    if part == "audit":
        return files.audit(folder, options.repeats)
    return files.spikes(options.spike_steps, options.seed)


def shown(title: str, rows: Sequence[Row]) -> Table:
    """Rows as a table; a row may lack a column."""
    table, names = Table(title=title), list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    options = build_parser().parse_args(arguments)
    console, results = Console(), dict[str, list[Row]]()
    before = os.getloadavg()[0]
    try:
        for part in dict.fromkeys(options.parts):
            with tempfile.TemporaryDirectory(prefix=".bench-", dir=options.folder) as folder:
                results[part] = measured(part, Path(folder), options)
            console.print(shown(part, results[part]))
        load = f"{before:.1f} before, {os.getloadavg()[0]:.1f} behind"
        console.print(f"{os.cpu_count()} cores, load average {load}; {time.strftime('%Y-%m-%d', time.gmtime())}")
        if options.json:
            options.json.write_text(json.dumps({"load_average": load, "cores": os.cpu_count(), **results}, indent=1))
    except (SipError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
