"""What the client costs: calls per second, CPU and latency of a call to a server that answers at once.

    python tools/bench/judge.py client [--in-flight 1 64 1024] [--calls 4000] [--json FILE]

Three depths of the same call: `client` posts one ready body; `judge` builds the prompt of a logit verdict, sees that it
fits, posts it and reads the probabilities; `services` puts whole pools to the background thread as a run does.
One core is the client's and one the server's where the machine has two.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig
from megatron_sip.errors import SipError
from megatron_sip.services.client import ServiceClient
from megatron_sip.services.endpoint import ClientSettings
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.services.judges import QualityJudge, Reading
from megatron_sip.services.model_server import ModelServer
from megatron_sip.types import Candidate, CandidateKind, Missing, Pool, Question

DEPTHS = ("client", "judge", "services")
CANDIDATES = 17
PREFIX_WORDS, SUFFIX_WORDS = 700, 96
"""About 1024 and 128 tokens."""
WARM_UP_CALLS = 300


@dataclass(frozen=True)
class ClientCost:
    """One measurement. Latencies are of single calls, in milliseconds; None where calls are not seen one by one.

    `cpu_us` is processor time of this process per call, and `calls_per_cpu_second` its inverse, which other processes
    on the machine disturb less than the rate by the wall clock; `server_share` is what the server used of its core.
    """

    depth: str
    in_flight: int
    calls: int
    calls_per_second: float
    calls_per_cpu_second: float
    cpu_us: float
    latency_ms_median: float | None
    latency_ms_p99: float | None
    server_share: float


def measure(depths: Sequence[str], in_flight: Sequence[int], calls: int) -> list[ClientCost]:
    """Every depth at every number of calls in flight, each on the same fresh server.

    Raises:
        RuntimeError: an answer is missing, so that what was measured is not the way of a verdict.
    """
    measures = {"client": _client, "judge": _judge, "services": _services}
    with instant_server() as (url, server):
        return [measures[depth](url, server, flight, calls) for depth in depths for flight in in_flight]


@contextmanager
def instant_server() -> Iterator[tuple[str, psutil.Process]]:
    """Base URL and process of a running instant server; each of the two processes has a core of its own, if it can."""
    script = Path(__file__).with_name("instant_server.py")
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError(f"{script} did not start")
        if len(cores) > 1:
            os.sched_setaffinity(process.pid, {cores[1]})
            os.sched_setaffinity(0, {cores[0]})
        try:
            yield url, psutil.Process(process.pid)
        finally:
            os.sched_setaffinity(0, before)
            process.terminate()


def pools(count: int, seed: int = 1) -> list[Pool]:
    """Pools of a usual size, of random words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]

    def text(length: int) -> str:
        return "".join(f" {word}" for word in draw.choices(words, k=length))

    made = []
    for number in range(count):
        candidates = [Candidate(CandidateKind.ROLLOUT, (number, k), text(SUFFIX_WORDS)) for k in range(CANDIDATES)]
        made.append(Pool(number, text(PREFIX_WORDS), text(SUFFIX_WORDS), tuple(candidates)))
    return made


def questions() -> list[Question]:
    """All pairs of a pool in both orders."""
    places = range(CANDIDATES)
    return [Question("quality", i, j) for i in places for j in places if i != j]


def _client(url: str, server: psutil.Process, in_flight: int, calls: int) -> ClientCost:
    async def run() -> ClientCost:
        client = ServiceClient(_settings(url, in_flight), {})
        await client.open()
        prompt = " ".join(["word"] * (PREFIX_WORDS + 2 * SUFFIX_WORDS))
        body = {"model": "instant", "messages": [{"role": "user", "content": prompt}], "max_tokens": 1}
        try:
            return await _timed("client", in_flight, calls, server, lambda _: client.post("/chat/completions", body))
        finally:
            await client.close()

    return asyncio.run(run())


def _judge(url: str, server: psutil.Process, in_flight: int, calls: int) -> ClientCost:
    asked = [(pool, question) for pool in pools(-(-calls // len(questions()))) for question in questions()]

    async def run() -> ClientCost:
        model = ModelServer(ServiceClient(_settings(url, in_flight), {}))
        await model.start()
        judge = QualityJudge(model, Reading("logit"))
        await judge.start()
        try:
            return await _timed("judge", in_flight, calls, server, lambda index: judge.ask(*asked[index % len(asked)]))
        finally:
            await model.client.close()

    return asyncio.run(run())


async def _timed(
    depth: str, in_flight: int, calls: int, server: psutil.Process, call: Callable[[int], Awaitable[object]]
) -> ClientCost:
    """Keep `in_flight` calls under way until all are done."""
    numbers = iter(range(calls))
    seconds: list[float] = []

    async def work(mine: Iterator[int]) -> None:
        for index in mine:
            began = time.perf_counter()
            answer = await call(index)
            seconds.append(time.perf_counter() - began)
            if isinstance(answer, Missing):
                raise RuntimeError(f"a verdict is missing: {answer}")

    warm_up = iter(range(max(WARM_UP_CALLS, in_flight)))
    await asyncio.gather(*(work(warm_up) for _ in range(in_flight)))
    seconds.clear()
    clock = _Clock(server)
    await asyncio.gather(*(work(numbers) for _ in range(in_flight)))
    ordered = sorted(1000 * value for value in seconds)
    return clock.cost(depth, in_flight, calls, ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))])


def _services(url: str, server: psutil.Process, in_flight: int, calls: int) -> ClientCost:
    judge = JudgeConfig(judge_url=(url,), judge_reading="logit", judge_concurrency=in_flight, judge_failure="stop")
    config = Config(preference=PreferenceConfig(pool=("rollout",)), judge=judge)
    # Enough to open every connection, as in a run of which this is not the first step.
    warm_up = pools(1 + in_flight // len(questions()), seed=2)
    asked = pools(-(-calls // len(questions())))
    with PreferenceServices(config, {}) as services:
        services.submit_answers(warm_up, [questions()] * len(warm_up)).result()
        clock = _Clock(server)
        answers = services.submit_answers(asked, [questions()] * len(asked)).result()
        cost = clock.cost("services", in_flight, sum(len(given) for given in answers), None, None)
    missing = [value for given in answers for value in given.values() if isinstance(value, Missing)]
    if missing:
        raise RuntimeError(f"{len(missing)} verdicts are missing, such as {missing[0]}")
    return cost


class _Clock:
    """Wall and processor time since it was made."""

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self._wall, self._cpu, self._server_cpu = time.perf_counter(), time.process_time(), self._of_server()

    def _of_server(self) -> float:
        used = self._server.cpu_times()
        return float(used.user + used.system)

    def cost(self, depth: str, in_flight: int, calls: int, median: float | None, p99: float | None) -> ClientCost:
        """What `calls` calls have cost."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return ClientCost(
            depth=depth,
            in_flight=in_flight,
            calls=calls,
            calls_per_second=calls / wall,
            calls_per_cpu_second=calls / cpu,
            cpu_us=1e6 * cpu / calls,
            latency_ms_median=median,
            latency_ms_p99=p99,
            server_share=(self._of_server() - self._server_cpu) / wall,
        )


def _settings(url: str, in_flight: int) -> ClientSettings:
    return ClientSettings(urls=(url,), concurrency=in_flight, retries=0)


def table(costs: Sequence[ClientCost]) -> str:
    """The measurements for people to read, in Markdown."""
    lines = [
        "| depth | in flight | calls/s | calls per CPU second | CPU per call (us) | latency median (ms) | p99 (ms) "
        "| server's core |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        median, p99 = (
            "-" if value is None else f"{value:.2f}" for value in (cost.latency_ms_median, cost.latency_ms_p99)
        )
        lines.append(
            f"| {cost.depth} | {cost.in_flight} | {cost.calls_per_second:.0f} | {cost.calls_per_cpu_second:.0f} "
            f"| {cost.cpu_us:.0f} | {median} | {p99} | {cost.server_share:.0%} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="judge.py client", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", nargs="+", choices=DEPTHS, default=DEPTHS, help="how much of the way of a verdict")
    parser.add_argument("--in-flight", nargs="+", type=int, default=[1, 64, 1024], help="calls under way at a time")
    parser.add_argument("--calls", type=int, default=4000, help="calls of one measurement (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit status."""
    args = build_parser().parse_args(argv)
    if min(*args.in_flight, args.calls) < 1:
        print("judge_client: --in-flight and --calls must be at least 1", file=sys.stderr)
        return 1
    try:
        costs = measure(args.depth, args.in_flight, args.calls)
    except (SipError, RuntimeError) as error:
        print(f"judge_client: {error}", file=sys.stderr)
        return 1
    print(table(costs))
    if args.json is not None:
        args.json.write_text(json.dumps({"client": [asdict(cost) for cost in costs]}, indent=1) + "\n")
    return 0
