"""What verdicts cost on a real judge server: rate, prompt tokens, prefix cache hits, and the client's CPU time.

    python tools/bench/judge_server.py --judge-url http://127.0.0.1:8100/v1 --text data/demo/held_out.jsonl

Pools are made of real prose and asked as a run asks them, each arm on texts that the server has not seen. Arms:
unshared     quality by logit, each pair in both orders; each prompt begins with a code of its own, so nothing can come
             from the prefix cache
quality      the prompts as they are, which share their beginning, in the order in which a run asks
grouped      the same, those with the same first option together
safety       logit
factuality   logit
likelihood   log-probabilities of the prompt, which vLLM never takes from its cache
generate     quality in words: a few pairs in one order, up to --max-tokens
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.config.groups import JudgeConfig
from megatron_sip.errors import SipError
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.judges import FactualityJudge, Judge, QualityJudge, Reading, SafetyJudge
from megatron_sip.services.likelihood import LikelihoodJudge
from megatron_sip.services.model_server import ModelServer
from megatron_sip.services.queueing import run_bounded
from megatron_sip.services.settings import judge_settings
from megatron_sip.types import Missing, Pool, Question, Verdict
from tools.bench.prose_pools import prose_pools, read_texts, salted
from tools.bench.vllm_metrics import fetch

LOGIT = Reading("logit")


class Unshared(ModelServer):
    """A server whose prompts share nothing: each begins with a code of its own."""

    async def chat(self, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any] | Missing:
        """One chat completion of these messages behind a code."""
        first = {**messages[0], "content": f"{secrets.token_hex(8)}\n{messages[0]['content']}"}
        return await super().chat([first, *messages[1:]], **fields)


@dataclass(frozen=True)
class Arm:
    """One way to ask: the judge that `judge` makes on a server of the kind `server`, and the questions on a pool."""

    name: str
    judge: Callable[[ModelServer], Judge]
    questions: Callable[[Pool], list[Question]]
    server: type[ModelServer] = ModelServer


@dataclass(frozen=True)
class Measured:
    """What one arm took. Tokens are the server's own counts; `cpu_share` is CPU time of this process per second."""

    arm: str
    verdicts: int
    seconds: float
    verdicts_per_second: float
    prompt_tokens: float
    prompt_tokens_per_second: float
    answer_tokens: float
    hit_rate: float | None
    cpu_share: float
    missing: dict[str, int]


def as_planned(pool: Pool) -> list[Question]:
    """Every pair in both orders, one after the other: all pairs of the scoring plan."""
    pairs = combinations(range(len(pool.candidates)), 2)
    return [Question("quality", *order) for i, j in pairs for order in ((i, j), (j, i))]


def grouped(pool: Pool) -> list[Question]:
    """The same questions, those with the same first option together."""
    return sorted(as_planned(pool), key=lambda question: question.first)


def one_order(most: int) -> Callable[[Pool], list[Question]]:
    """At most so many pairs of a pool, each in one order."""
    return lambda pool: as_planned(pool)[: 2 * most : 2]


def pointwise(judge: str) -> Callable[[Pool], list[Question]]:
    """Each candidate."""
    return lambda pool: [Question(judge, index) for index in range(len(pool.candidates))]


def arms(max_tokens: int, generated_pairs: int) -> list[Arm]:
    """All arms in the order of the table."""
    spoken = Reading("generate", temperature=1.0, max_tokens=max_tokens)
    return [
        Arm("unshared", lambda server: QualityJudge(server, LOGIT), as_planned, Unshared),
        Arm("quality", lambda server: QualityJudge(server, LOGIT), as_planned),
        Arm("grouped", lambda server: QualityJudge(server, LOGIT), grouped),
        Arm("safety", lambda server: SafetyJudge(server, LOGIT), pointwise("safety")),
        Arm("factuality", lambda server: FactualityJudge(server, LOGIT), pointwise("factuality")),
        Arm("likelihood", LikelihoodJudge, pointwise("likelihood")),
        Arm("generate", lambda server: QualityJudge(server, spoken), one_order(generated_pairs)),
    ]


async def measure(arm: Arm, pools: Sequence[Pool], config: JudgeConfig) -> Measured:
    """Ask all questions of an arm with the concurrency of `config`. Raises ServiceError for a server of no use."""
    server = arm.server(ServiceClient(judge_settings(config)))
    try:
        await server.start()
        judge = arm.judge(server)
        await judge.start()
        fresh = [salted(pool, secrets.token_hex(4)) for pool in pools]
        jobs = [(pool, question) for pool in fresh for question in arm.questions(pool)]
        before = await asyncio.to_thread(fetch, config.judge_url[0])
        started, busy = time.perf_counter(), time.process_time()
        verdicts: list[Verdict] = await run_bounded(
            (judge.ask(pool, question) for pool, question in jobs), 2 * config.judge_concurrency
        )
        seconds, busy = time.perf_counter() - started, time.process_time() - busy
        used = (await asyncio.to_thread(fetch, config.judge_url[0])).since(before)
    finally:
        await server.client.close()
    reasons = Counter(verdict.reason.value for verdict in verdicts if isinstance(verdict, Missing))
    return Measured(
        arm=arm.name,
        verdicts=len(verdicts),
        seconds=seconds,
        verdicts_per_second=len(verdicts) / seconds,
        prompt_tokens=used.prompt,
        prompt_tokens_per_second=used.prompt / seconds,
        answer_tokens=used.answer,
        hit_rate=used.hit_rate,
        cpu_share=busy / seconds,
        missing=dict(reasons),
    )


def table(rows: Sequence[Measured]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| arm | verdicts | seconds | verdicts/s | prompt tokens | prompt tokens/s | answer tokens | prefix cache hits "
        "| client CPU | missing |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = "-" if row.hit_rate is None else f"{100 * row.hit_rate:.0f} %"
        missing = ", ".join(f"{count} {reason}" for reason, count in sorted(row.missing.items())) or "0"
        lines.append(
            f"| {row.arm} | {row.verdicts} | {row.seconds:.1f} | {row.verdicts_per_second:.2f} | "
            f"{row.prompt_tokens:.0f} | {row.prompt_tokens_per_second:.0f} | {row.answer_tokens:.0f} | {rate} | "
            f"{100 * row.cpu_share:.1f} % | {missing} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge-url", required=True, help="base URL of one vLLM server, ending in /v1")
    parser.add_argument("--judge-model", help="model that must be served (default: the only one)")
    parser.add_argument("--text", type=Path, required=True, help="JSONL file of documents")
    parser.add_argument("--json-key", default="text", help="key of the text in a line (default: text)")
    parser.add_argument("--pools", type=int, default=4, help="prefixes (default: 4)")
    parser.add_argument("--candidates", type=int, default=6, help="candidates of each (default: 6)")
    parser.add_argument("--prefix-words", type=int, default=150, help="words of a prefix (default: 150)")
    parser.add_argument("--suffix-words", type=int, default=60, help="words of a candidate (default: 60)")
    parser.add_argument("--concurrency", type=int, default=64, help="calls in flight (default: 64)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds of one call (default: 300)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer of generate (default: 128)")
    parser.add_argument("--generated-pairs", type=int, default=2, help="pairs of a pool for generate (default: 2)")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these arms")
    parser.add_argument("--repeats", type=int, default=1, help="times that the arms are run in turn (default: 1)")
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser


async def run(args: argparse.Namespace) -> list[Measured]:
    """All chosen arms, one after the other. Raises SipError."""
    known = arms(args.max_tokens, args.generated_pairs)
    chosen = [arm for arm in known if args.arms is None or arm.name in args.arms]
    if args.arms is not None and len(chosen) < len(set(args.arms)):
        raise SipError(f"--arms {' '.join(args.arms)}: the arms are {', '.join(arm.name for arm in known)}")
    texts = read_texts(args.text, args.json_key)
    pools = prose_pools(texts, args.pools, args.candidates, args.prefix_words, args.suffix_words)
    config = JudgeConfig(
        judge_url=(args.judge_url,),
        judge_model=args.judge_model,
        judge_concurrency=args.concurrency,
        judge_timeout=args.timeout,
        judge_failure="stop",
    )
    rows = []
    for _ in range(args.repeats):
        for arm in chosen:
            rows.append(await measure(arm, pools, config))
            print(f"{rows[-1].arm}: {rows[-1].seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        rows = asyncio.run(run(args))
    except SipError as error:
        print(f"judge_server: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    if args.json:
        shape = {"pools": args.pools, "candidates": args.candidates, "concurrency": args.concurrency}
        shape |= {"prefix_words": args.prefix_words, "suffix_words": args.suffix_words}
        args.json.write_text(json.dumps({**shape, "arms": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
