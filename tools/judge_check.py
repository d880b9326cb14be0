"""Check a judge on labelled pairs before trusting it: accuracy, order consistency, position bias, missing, cost.

    python tools/judge_check.py --pairs data/judge_pairs.jsonl --judge-url http://127.0.0.1:8100/v1 \\
        --readings logit likelihood --limit 200 --json check.json --report check.md

Each line of --pairs is a pair (prefix, good, bad) or a text (text, label; for factuality also prefix and suffix), with
the name of its set in "set"; tools/make_judge_pairs.py makes such a file. Quality is asked in both orders and reported
for the seeded order alone as well. The judges are those of training, with their prompts and parsing; --judge-set sets
single fields of single judges as in a run. A reward model ranks the pairs and scores the texts:

    ... --readings reward --judge-set reward.url=http://127.0.0.1:8200/v1 reward.offset=2.5

Keys come from JUDGE_API_KEY for the hosts of --judge-url, or from NAME_JUDGE_API_KEY for a single judge. Exit status 1
where nothing could be checked or a reading gave no verdict at all.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console

from megatron_sip.config.groups import JudgeConfig
from megatron_sip.config.numbers import amount, seconds, share, whole_number
from megatron_sip.errors import ConfigError, SipError
from megatron_sip.evaluation.checked_judges import (
    READINGS,
    CheckedService,
    ReadingName,
    config_for,
    readings_of,
)
from megatron_sip.evaluation.judge_check import CheckedReading, Prices, Result, check_reading
from megatron_sip.evaluation.judge_report import (
    CheckReport,
    grids,
    json_text,
    markdown,
    remarks,
    silent,
    title,
    write_file,
)
from megatron_sip.evaluation.labelled import Labelled, of_kind, read_labelled
from megatron_sip.evaluation.progress import Steps
from megatron_sip.evaluation.report import print_grids
from megatron_sip.services.hub import PreferenceServices

WIDTH_OF_A_FILE = 200


def build_parser() -> argparse.ArgumentParser:
    """The flags; those of the judge as in a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, judge = parser.add_argument, JudgeConfig()
    add("--pairs", type=Path, required=True, help="JSONL of labelled pairs and texts")
    add("--judge-url", nargs="+", default=(), help="base URLs of the judge's servers")
    add("--judge-model", help="model name on the server (default: the only one)")
    add("--judge-set", nargs="+", default=[], metavar="NAME.FIELD=VALUE", help="single judges, as in a run")
    add(
        "--readings",
        nargs="+",
        choices=READINGS,
        default=["logit", "generate"],
        help="how verdicts are read; each is asked about the records that it can judge (default: logit generate)",
    )
    add("--votes", type=whole_number(1), default=1, help="votes of a question with generate (default %(default)s)")
    add("--one-order", action="store_true", help="ask each pair in its seeded order only")
    add("--limit", type=whole_number(1), help="the first so many records of each set (default: all)")
    add("--judge-temperature", type=amount, default=judge.judge_temperature, help="of a vote (default %(default)s)")
    add("--judge-top-p", type=share, default=judge.judge_top_p, help="of a vote (default %(default)s)")
    add("--judge-max-tokens", type=whole_number(1), default=judge.judge_max_tokens, help="(default %(default)s)")
    add("--judge-reasoning-effort", choices=["low", "medium", "high"], help="of gpt-oss style judges")
    add("--judge-max-context", type=whole_number(1), help="tokens (default: what the server reports)")
    add("--judge-concurrency", type=whole_number(1), default=32, help="calls in flight (default %(default)s)")
    add("--judge-timeout", type=seconds, default=300.0, help="seconds of one call, retries included")
    add("--allow-insecure-judge", action="store_true", help="send a key over plain http to another host")
    add("--classifiers-dir", type=Path, help="folder that holds toxic-bilstm/, as tools/get_demo_data.py makes it")
    add("--price-per-million-prompt-tokens", type=amount, help="money; needs the price of the answer, too")
    add("--price-per-million-answer-tokens", type=amount, help="money; needs the price of the prompt, too")
    add("--seed", type=whole_number(0), default=1234, help="seed of option orders and bootstrap")
    add("--json", type=Path, help="write all numbers to this file")
    add("--report", type=Path, help="write the tables as Markdown to this file")
    return parser


def judge_config(args: argparse.Namespace) -> JudgeConfig:
    """The judge's settings, without weights. ConfigError where a reading lacks what it needs."""
    if "toxic-bilstm" in args.readings and args.classifiers_dir is None:
        raise ConfigError(
            "--readings toxic-bilstm needs --classifiers-dir, the folder that holds toxic-bilstm/; "
            "`python tools/get_demo_data.py` makes data/demo/classifiers"
        )
    return JudgeConfig(
        judge_url=tuple(args.judge_url),
        judge_model=args.judge_model,
        judge_set=tuple(args.judge_set),
        judge_max_context=args.judge_max_context,
        judge_temperature=args.judge_temperature,
        judge_top_p=args.judge_top_p,
        judge_max_tokens=args.judge_max_tokens,
        judge_reasoning_effort=args.judge_reasoning_effort,
        judge_concurrency=args.judge_concurrency,
        judge_timeout=args.judge_timeout,
        judge_failure="stop",
        allow_insecure_judge=args.allow_insecure_judge,
        classifier_path=str(args.classifiers_dir / "toxic-bilstm") if args.classifiers_dir else None,
    )


def prices_of(args: argparse.Namespace) -> Prices | None:
    """Both prices or none. ConfigError for one alone."""
    prompt, answer = args.price_per_million_prompt_tokens, args.price_per_million_answer_tokens
    if (prompt is None) != (answer is None):
        raise ConfigError(
            "--price-per-million-prompt-tokens and --price-per-million-answer-tokens belong together: give both or none"
        )
    return None if prompt is None else Prices(prompt, answer)


def check(args: argparse.Namespace) -> CheckReport:
    """The whole check. Raises SipError for what the user can mend."""
    judge, prices = judge_config(args), prices_of(args)
    records = read_labelled(args.pairs)
    readings = readings_of(args.readings, {record.kind for record in records}, args.votes, not args.one_order, judge)
    for path, flag in ((args.json, "--json"), (args.report, "--report")):
        if path is not None:
            write_file(path, "", flag, "a")  # what cannot be written shows before the judge is asked, not after
    results: list[Result] = []
    models: list[str] = []
    for name, reading in readings:
        found, served = _check_one(name, reading, records, judge, prices, args)
        results += found
        models += [] if served is None else [served]
    return CheckReport(
        model=", ".join(dict.fromkeys(models)) or None,
        date=time.strftime("%Y-%m-%d"),
        results=tuple(results),
        versions={reading.label: reading.version for _, reading in readings},
        settings={
            "pairs": str(args.pairs),
            "judge_set": args.judge_set,
            "votes": args.votes,
            "limit": args.limit,
            "temperature": args.judge_temperature,
            "top_p": args.judge_top_p,
            "max_tokens": args.judge_max_tokens,
            "reasoning_effort": args.judge_reasoning_effort,
            "concurrency": args.judge_concurrency,
            "seed": args.seed,
        },
        prices=prices,
    )


def _check_one(
    name: ReadingName,
    reading: CheckedReading,
    records: Sequence[Labelled],
    judge: JudgeConfig,
    prices: Prices | None,
    args: argparse.Namespace,
) -> tuple[list[Result], str | None]:
    """The results of one reading, and the model that the server serves."""
    sets = of_kind(records, reading.kind, args.limit)
    steps = Steps(reading.label, sum(map(len, sets.values())))
    with PreferenceServices(config_for(name, reading, judge)) as services:
        found = check_reading(
            reading,
            sets,
            CheckedService(services),
            seed=args.seed,
            group_size=args.judge_concurrency,
            prices=prices,
            on_progress=steps.add,
        )
        return found, services.judge_model


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    # A log or a pipe has no width of its own, and eighty columns would fold every number.
    console = Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=WIDTH_OF_A_FILE)
    try:
        report = check(args)
        console.print(title(report), markup=False, highlight=False)
        print_grids(grids(report), remarks(report), console)  # first: a full disk must not take the numbers with it
        if args.json is not None:
            write_file(args.json, json_text(report), "--json")
        if args.report is not None:
            write_file(args.report, markdown(report), "--report")
    except SipError as error:
        print(f"judge_check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("judge_check: stopped; nothing was reported", file=sys.stderr)
        return 130
    quiet = silent(report.results)
    if quiet:
        print(f"judge_check: no verdict at all from {'; '.join(quiet)}; see what is missing above", file=sys.stderr)
    return 1 if quiet else 0


if __name__ == "__main__":
    sys.exit(main())
