"""The flags by which tools that measure name their judge, and the settings that follow from them."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_sip.config.groups import JudgeConfig
from megatron_sip.config.numbers import seconds, whole_number


def add_judge_flags(parser: argparse.ArgumentParser, judge_set: str) -> None:
    """Servers, model, reading, single judges, calls in flight, deadline; `judge_set` is the help of `--judge-set`."""
    add = parser.add_argument
    add("--judge-url", nargs="+", required=True, help="base URLs of the judge's servers")
    add("--judge-model", help="model name on the server (default: the only one)")
    add("--judge-reading", choices=["logit", "generate"], default="logit", help="how a verdict is read")
    add("--judge-set", nargs="+", default=[], metavar="NAME.FIELD=VALUE", help=judge_set)
    add("--judge-concurrency", type=whole_number(1), default=32, help="calls in flight")
    add("--judge-timeout", type=seconds, default=300.0, help="seconds of one call, retries included")


def judge_of_flags(args: argparse.Namespace, **settings: Any) -> JudgeConfig:
    """What the flags above say, with further `settings`; who measures does not go on without its judge."""
    return JudgeConfig(
        judge_url=tuple(args.judge_url),
        judge_model=args.judge_model,
        judge_reading=args.judge_reading,
        judge_set=tuple(args.judge_set),
        judge_concurrency=args.judge_concurrency,
        judge_timeout=args.judge_timeout,
        judge_failure="stop",
        **settings,
    )
