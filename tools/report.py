"""Print what happened in a run: curves, first and last values, seconds per part, missing verdicts.

python tools/report.py runs/sip/metrics.jsonl
python tools/report.py runs/ntp/metrics.jsonl runs/sip/metrics.jsonl --svg runs/report.svg
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_sip.errors import ConfigError, SipError
from megatron_sip.metrics.summary import print_summary, read_run

SVG_WIDTH = 120


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Summarise one run, or compare two, from --metrics-file.")
    parser.add_argument("metrics", nargs="+", type=Path, help="one or two metrics files")
    parser.add_argument("--svg", type=Path, help="also write the tables and curves as an SVG picture")
    return parser.parse_args(arguments)


def write_svg(path: Path, console: Console) -> None:
    """Save what the recording console printed. ConfigError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        console.save_svg(str(path), title="megatron_sip")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}); give another file with --svg") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the summary; 2 for bad input, with one line that says what is wrong."""
    options = parse_arguments(arguments)
    try:
        if len(options.metrics) > 2:
            raise ConfigError(f"{len(options.metrics)} metrics files are given; give one or two")
        runs = [read_run(path) for path in options.metrics]
        if len(runs) == 2 and runs[0].name == runs[1].name:
            runs = [
                type(run)(str(path), run.iterations, run.series)
                for run, path in zip(runs, options.metrics, strict=True)
            ]
        print_summary(runs, Console())
        if options.svg is not None:
            recorder = Console(record=True, width=SVG_WIDTH, file=io.StringIO())
            print_summary(runs, recorder)
            write_svg(options.svg, recorder)
    except SipError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
