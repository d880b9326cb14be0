"""Ten thousand verdicts from a server that answers oddly 60 % of the time: each right, or missing for its reason."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest
from fake_server import FakeServer
from fault_schedule import FAULTS, Fault, FaultSchedule, QuestionKey, Reading, right_verdict

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig
from megatron_sip.services.hub import PreferenceServices
from megatron_sip.types import Candidate, CandidateKind, Missing, MissingReason, Pool, Question, Verdict

CANDIDATES = 17
RETRIES = 2
SHARE = 0.05
WARM_UP = 2000
"""Verdicts after which the memory is measured for the first time."""
MOST_GROWTH = 16 * 2**20
"""Bytes of resident memory, client and server together, from there to the end, besides the test's own books."""
BOOKS = 512
"""Bytes that the test itself keeps of each verdict: question, verdict, attempts and answers of the schedule."""
LATE_SHARE = 0.05
"""Of the verdicts, how many a busy machine may turn into time-outs."""


def config_of(reading: Reading, urls: Sequence[str]) -> Config:
    judge = JudgeConfig(
        judge_url=tuple(urls),
        judge_reading=reading,
        quality_weight=1.0,
        safety_weight=1.0,
        judge_concurrency=192,
        judge_timeout=3.0,
        judge_retries=RETRIES,
    )
    return Config(preference=PreferenceConfig(pool=("rollout",)), judge=judge)


def pool_of(number: int) -> Pool:
    """A pool whose candidates have worths that no other pool has, in no order."""
    worths = [number * 100 + (37 * place) % 97 for place in range(CANDIDATES)]
    texts = [f" It is worth {worth} in all." for worth in worths]
    candidates = [Candidate(CandidateKind.ROLLOUT, (worth,), text) for worth, text in zip(worths, texts, strict=True)]
    return Pool(number, f"Lot {number} came up.", "It was sold.", tuple(candidates))


def questions_on(pool: Pool, reading: Reading) -> list[Question]:
    """All pairs, in both orders with `logit`, and each candidate alone."""
    places = range(len(pool.candidates))
    pairs = [(i, j) for i in places for j in places if i < j or (i > j and reading == "logit")]
    return [Question("quality", i, j) for i, j in pairs] + [Question("safety", i) for i in places]


def key_of(pool: Pool, question: Question) -> QuestionKey:
    shown = (question.first,) if question.second is None else (question.first, question.second)
    return tuple(pool.candidates[place].tokens[0] for place in shown)


def rounds(reading: Reading, verdicts: int) -> Iterator[tuple[list[Pool], list[list[Question]]]]:
    """Pools with their questions, about a thousand questions at a time, until there are enough."""
    asked, number = 0, 1
    while asked < verdicts:
        pools, questions, size = [], [], 0
        while size < 1000:
            pools.append(pool_of(number))
            questions.append(questions_on(pools[-1], reading))
            size, number = size + len(questions[-1]), number + 1
        asked += size
        yield pools, questions


class Soak:
    """Asks everything and keeps what came: verdicts by question, and the memory in use."""

    def __init__(self, servers: Sequence[FakeServer], schedule: FaultSchedule, reading: Reading, verdicts: int) -> None:
        self.verdicts: dict[QuestionKey, Verdict] = {}
        self.early = self.late = 0
        for server in servers:
            server.fault_every_time = schedule
        with PreferenceServices(config_of(reading, [server.url for server in servers]), {}) as services:
            for pools, questions in rounds(reading, verdicts):
                answers = services.submit_answers(pools, questions).result()
                for pool, group, given in zip(pools, questions, answers, strict=True):
                    assert list(given) == group, "an answer to each question, and no other"
                    self.verdicts |= {key_of(pool, question): verdict for question, verdict in given.items()}
                for server in servers:
                    server.requests.clear()
                    server.headers.clear()
                if not self.early and len(self.verdicts) >= WARM_UP:
                    self.early = memory_in_use()
            self.late = memory_in_use()
            self.stats = services.stats()


def memory_in_use() -> int:
    """Bytes of resident memory, when the allocator has given back what nobody holds."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.alone
@pytest.mark.parametrize("reading", ["generate", "logit"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_kind_of_fault_is_missing_for_its_reason(fault: Fault, reading: Reading) -> None:
    pool, schedule = pool_of(1), FaultSchedule(seed=1, share=0.0)
    asked = [Question("quality", 0, 1), Question("safety", 2)]
    with FakeServer(max_model_len=8192) as server:
        config = config_of(reading, [server.url])
        config = replace(config, judge=replace(config.judge, judge_timeout=0.3, judge_retries=0))
        with PreferenceServices(config, {}) as services:
            server.fault_every_time = fault.handler
            [faulty] = services.submit_answers([pool], [asked]).result()
            server.fault_every_time = schedule
            [right] = services.submit_answers([pool], [asked]).result()
            stats = services.stats()
    for question in asked:
        missing = faulty[question]
        assert isinstance(missing, Missing)
        assert missing.reason is fault.reason(reading)
        assert stats[f"missing/{question.judge}/{fault.reason(reading)}"] == 1
        assert right[question] == pytest.approx(right_verdict(key_of(pool, question), reading))


def check(reading: Reading, verdicts: int, servers: int) -> None:
    schedule = FaultSchedule(seed=2601, share=SHARE)
    began = time.monotonic()
    with ExitStack() as running:
        pool = [running.enter_context(FakeServer(max_model_len=8192)) for _ in range(servers)]
        soak = Soak(pool, schedule, reading, verdicts)
    seconds, count = time.monotonic() - began, len(soak.verdicts)
    reasons = Counter(verdict.reason for verdict in soak.verdicts.values() if isinstance(verdict, Missing))
    print(
        f"{reading}, {servers} server(s): {count} verdicts in {seconds:.0f} s, {sum(schedule.attempts.values())} "
        f"requests, {sum(reasons.values())} missing {dict(reasons)}, memory {(soak.late - soak.early) / 2**20:+.1f} MiB"
    )
    assert count >= verdicts
    # Nothing is lost and nothing is doubled; what ran out of time before it was sent is missing, as is checked below.
    assert soak.verdicts.keys() >= schedule.attempts.keys()
    # An answer that comes too late is lost, and asked for again where there is another server to ask.
    assert servers > 1 or max(schedule.answered.values()) == 1
    assert max(schedule.attempts.values()) <= RETRIES + 1
    assert sum(soak.stats[f"asked/{name}"] for name in ("quality", "safety")) == count
    counted: Counter[str] = Counter()
    for name, number in soak.stats.items():
        if name.startswith("missing/"):
            counted[name.split("/")[2]] += int(number)
    assert counted == Counter({reason.value: number for reason, number in reasons.items()})
    # Every kind of fault came as often as it should.
    requests = sum(schedule.attempts.values())
    for fault in FAULTS:
        assert schedule.dealt[fault.name] / requests == pytest.approx(SHARE, rel=0.25), fault.name
    late = 0
    for key, verdict in soak.verdicts.items():
        if not isinstance(verdict, Missing):
            assert verdict == pytest.approx(right_verdict(key, reading)), key
            assert schedule.answered[key] >= 1
            continue
        # The fault of one of its attempts, or a deadline that left no time for more of them.
        assert verdict.reason in {MissingReason.TIMEOUT, *schedule.reasons(key, reading)}, key
        late += verdict.reason != schedule.outcome(key, RETRIES, reading)
    # Among several servers a call that hangs has time for another, so that its outcome is not known beforehand.
    assert servers > 1 or late <= LATE_SHARE * count
    assert soak.late - soak.early < MOST_GROWTH + BOOKS * count


@pytest.mark.alone
@pytest.mark.parametrize("reading", ["generate", "logit"])
def test_ten_thousand_verdicts_are_right_or_missing_for_their_reason(reading: Reading) -> None:
    """Half of them with each reading."""
    check(reading, verdicts=5000, servers=1)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("reading", "servers"), [("generate", 1), ("logit", 2)])
def test_a_hundred_thousand_verdicts(reading: Reading, servers: int) -> None:
    check(reading, verdicts=50_000, servers=servers)
