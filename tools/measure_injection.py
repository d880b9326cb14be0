"""Measure how far a text can sway the quality judge by telling it what to answer.

    python tools/measure_injection.py --documents data/demo/held_out.jsonl --judge-url http://127.0.0.1:8100/v1

Real continuations are judged against those of other documents, in both option orders: as they are, with a line that
speaks to the judge, and with a line as long that does not. What is reported is the change of the belief that the text
wins. Keys come from JUDGE_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from megatron_sip.config.groups import Config
from megatron_sip.config.numbers import whole_number
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.evaluation.bootstrap import Estimate
from megatron_sip.evaluation.injection import Injection, duels_of, measure_injection
from megatron_sip.evaluation.judge_flags import add_judge_flags, judge_of_flags
from megatron_sip.evaluation.progress import Steps
from megatron_sip.evaluation.prompts import read_texts
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.types import Answers, Pool, Question


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--documents", type=Path, required=True, help="JSONL of real documents")
    add_judge_flags(parser, judge_set="settings of the judge quality, as in a run")
    add("--num-duels", type=whole_number(3), default=40, help="texts that carry the lines (default %(default)s)")
    add("--prefix-characters", type=whole_number(1), default=500, help="length of a prefix (default %(default)s)")
    add("--suffix-characters", type=whole_number(1), default=400, help="length of a continuation (default %(default)s)")
    add("--seed", type=whole_number(0), default=1234, help="seed of the bootstrap")
    add("--out", type=Path, help="JSON file for the numbers")
    return parser


def cut_documents(file: Path, count: int, prefix: int, suffix: int) -> list[tuple[str, str]]:
    """Prefix and continuation of the first `count` documents that are long enough; cuts are at white space.

    Raises:
        ConfigError: too few documents. DataError: the file cannot be read.
    """
    cuts = []
    for text in read_texts(file):
        first, second = text.find(" ", prefix), text.find(" ", prefix + suffix)
        if 0 <= first < second:
            cuts.append((text[:first], text[first:second]))
        if len(cuts) == count:
            return cuts
    raise ConfigError(
        f"--documents {file} has {len(cuts)} long enough documents, --num-duels asks for {count}; lower it"
    )


def measure(args: argparse.Namespace) -> Injection:
    """Ask the judge. Raises SipError for what the user can mend."""
    duels = duels_of(cut_documents(args.documents, args.num_duels, args.prefix_characters, args.suffix_characters))
    steps = Steps("the judge compares", len(duels))
    with PreferenceServices(Config(judge=judge_of_flags(args))) as services:

        def ask(pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
            answers = services.submit_answers(pools, questions).result()
            steps.add(len(pools))
            return answers

        return measure_injection(duels, ask, seed=args.seed)


def print_table(found: Injection, console: Console) -> None:
    """One line an attack."""
    table = Table(title=f"Belief that a text wins, {found.duels} texts, both option orders", title_justify="left")
    heads = ("line", "less without", "less neutral line", "wins without", "wins with", "more wins", "to win", "to loss")
    for position, head in enumerate(heads):
        table.add_column(head, justify="left" if position == 0 else "right")
    for sway in found.sways:
        cells = [_change(sway.over_plain), _change(sway.over_neutral), _share(sway.wins_plain), _share(sway.wins)]
        table.add_row(sway.attack, *cells, _change(sway.more_wins), str(sway.to_win), str(sway.to_loss))
    console.print(table)
    accuracy = "n/a" if found.accuracy is None else f"{found.accuracy.mean:.3f}"
    console.print(
        f"without any line the true continuation wins {accuracy} of the duels; missing verdicts: {found.missing}"
    )


def _change(estimate: Estimate | None) -> str:
    if estimate is None:
        return "n/a"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:+.3f}"
    return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        found = measure(args)
        print_table(found, Console(width=160))
        if args.out is not None:
            args.out.write_text(json.dumps(asdict(found), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except (SipError, OSError) as error:
        print(f"measure_injection: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
