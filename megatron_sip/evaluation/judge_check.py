"""How far a judge can be trusted: it is asked about labelled records, and what it says is compared with the labels.

The judge is asked through the same services as in training, so the same prompts, parsing and limits are checked.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sip.evaluation.bootstrap import Estimate, bootstrap_mean
from megatron_sip.evaluation.intervals import area_under_curve, bootstrap_ratio, wilson
from megatron_sip.evaluation.labelled import Kind, Labelled, LabelledPair
from megatron_sip.evaluation.observations import Observation, observe_orders, observe_ranking, observe_text
from megatron_sip.preference.draw import Purpose, draw_index
from megatron_sip.types import Answers, Candidate, CandidateKind, Pool, Question, Verdict

ALL_SETS = "all sets"
THOUSAND, MILLION = 1e3, 1e6
GOOD, BAD = 0, 1


@dataclass(frozen=True)
class Spent:
    """What answers have cost: calls to the server (/tokenize too), tokens by the server's own count, wall seconds.

    `unmetered` counts answers that do not tell their tokens.
    """

    calls: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    unmetered: int = 0
    seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.answer_tokens + other.answer_tokens,
            self.unmetered + other.unmetered,
            self.seconds + other.seconds,
        )

    def since(self, before: Spent) -> Spent:
        """What was spent after `before`."""
        return self + Spent(
            -before.calls, -before.prompt_tokens, -before.answer_tokens, -before.unmetered, -before.seconds
        )


class JudgeService(Protocol):
    """One judge in one reading."""

    def ask(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
        """One `Answers` per pool, with an entry (a verdict or a Missing) for every question."""
        ...

    def spent(self) -> Spent:
        """Calls and tokens since the start; the seconds are taken by who asks."""
        ...


@dataclass(frozen=True)
class CheckedReading:
    """One way of asking one judge.

    `judge` is the name in `Question.judge`, `kind` the records that it is asked about, `version` that of its words.
    `votes` repeat a question. A pairwise judge is asked in a seeded order, and with `both_orders` in the other one too.
    """

    label: str
    judge: str
    kind: Kind
    pairwise: bool
    version: str
    votes: int = 1
    both_orders: bool = True


@dataclass(frozen=True)
class Group:
    """Records that were asked about at once, and what that cost."""

    observations: tuple[Observation, ...]
    spent: Spent


@dataclass(frozen=True)
class Prices:
    """Money for a million tokens of the prompt and of the answer, in whatever currency."""

    prompt: float
    answer: float

    def of(self, spent: Spent) -> float:
        """What the tokens cost."""
        return (spent.prompt_tokens * self.prompt + spent.answer_tokens * self.answer) / MILLION


@dataclass(frozen=True)
class Cost:
    """What was spent in all; the others are per thousand verdicts (records with an answer), None where not known."""

    spent: Spent
    calls: Estimate | None
    prompt_tokens: Estimate | None
    answer_tokens: Estimate | None
    seconds: Estimate | None
    money: Estimate | None


@dataclass(frozen=True)
class Result:
    """One reading on one set.

    `accuracy` and `consistency` are shares of the answered records and of those answered in both orders, a tie counts
    as half right. `position_bias` is the mean belief in the option shown first less one half. `auc` stands where texts
    of both labels were scored. `missing` counts questions, `unanswered` records without any verdict.
    """

    reading: str
    set: str
    records: int
    unanswered: int
    accuracy: Estimate | None
    auc: Estimate | None
    consistency: Estimate | None
    position_bias: Estimate | None
    ties: int
    asked: int
    missing: dict[str, int]
    cost: Cost


def check_reading(
    reading: CheckedReading,
    sets: Mapping[str, Sequence[Labelled]],
    service: JudgeService,
    *,
    seed: int = 0,
    group_size: int = 32,
    prices: Prices | None = None,
    on_progress: Callable[[int], None] = lambda _records: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Result]:
    """Ask about all records, `group_size` at a time, and compare with their labels.

    A pairwise reading in both orders gives results for the seeded order alone as well: that is its first half.
    `on_progress` hears how many records were done. Results come by set, then for all sets where there are several.
    """
    asker = _Asker(reading, service, seed, clock)
    by_label: dict[str, dict[str, list[Group]]] = {}
    begun = 0
    for name, records in sets.items():
        for start in range(0, len(records), group_size):
            part = records[start : start + group_size]
            for label, group in asker.groups(part, begun):
                by_label.setdefault(label, {}).setdefault(name, []).append(group)
            begun += len(part)
            on_progress(len(part))
    results = []
    for label, groups in by_label.items():
        results += [summarise(label, name, some, seed, prices) for name, some in groups.items()]
        if len(groups) > 1:
            everything = [group for some in groups.values() for group in some]
            results.append(summarise(label, ALL_SETS, everything, seed, prices))
    return results


@dataclass(frozen=True)
class _Asker:
    """Puts the questions of one reading."""

    reading: CheckedReading
    service: JudgeService
    seed: int
    clock: Callable[[], float]

    def groups(self, records: Sequence[Labelled], begun: int) -> Iterator[tuple[str, Group]]:
        """(label, group) for each way in which the answers about `records` are read; `begun` counts those before."""
        pools = [pool_of(record, begun + index) for index, record in enumerate(records)]
        if not self.reading.pairwise:
            answers, spent = self._ask(pools, [self._pointwise(pool) for pool in pools])
            seen = tuple(self._observe_scores(*pair) for pair in zip(records, answers, strict=True))
            yield self.reading.label, Group(seen, spent)
            return
        orders = [self._order(pool) for pool in pools]
        first, spent = self._ask(pools, [self._pairwise(order) for order in orders])
        yield f"{self.reading.label}, one order", Group(tuple(map(self._observe_pair, first)), spent)
        if self.reading.both_orders:
            second, more = self._ask(pools, [self._pairwise(order[::-1]) for order in orders])
            both = [{**one, **other} for one, other in zip(first, second, strict=True)]
            yield f"{self.reading.label}, both orders", Group(tuple(map(self._observe_pair, both)), spent + more)

    def _ask(self, pools: list[Pool], questions: list[list[Question]]) -> tuple[list[Answers], Spent]:
        before, began = self.service.spent(), self.clock()
        answers = self.service.ask(pools, questions)
        seconds = self.clock() - began
        return answers, self.service.spent().since(before) + Spent(seconds=seconds)

    def _order(self, pool: Pool) -> tuple[int, int]:
        """The seeded option order, drawn as in training."""
        orders = ((GOOD, BAD), (BAD, GOOD))
        return orders[draw_index(2, self.seed, Purpose.OPTION_ORDER, pool.sample_index, GOOD, BAD)]

    def _pairwise(self, order: tuple[int, ...]) -> list[Question]:
        first, second = order
        return [Question(self.reading.judge, first, second, vote) for vote in range(self.reading.votes)]

    def _pointwise(self, pool: Pool) -> list[Question]:
        everyone, votes = range(len(pool.candidates)), range(self.reading.votes)
        return [Question(self.reading.judge, index, None, vote) for index in everyone for vote in votes]

    def _observe_pair(self, answers: Answers) -> Observation:
        return observe_orders(_about(answers, GOOD), _about(answers, BAD))

    def _observe_scores(self, record: Labelled, answers: Answers) -> Observation:
        if isinstance(record, LabelledPair):
            return observe_ranking(_about(answers, GOOD), _about(answers, BAD))
        return observe_text(_about(answers, GOOD), record.right)


def _about(answers: Answers, first: int) -> list[Verdict]:
    """Verdicts of the questions that name `first` first."""
    return [verdict for question, verdict in answers.items() if question.first == first]


def pool_of(record: Labelled, index: int) -> Pool:
    """The pool that a judge sees: the good candidate, then the bad one; or the one text.

    A candidate's `tokens` are the bytes of its text: they only say which candidates are the same.
    """
    if isinstance(record, LabelledPair):
        texts, reference = [record.good, record.bad], record.good
    else:
        texts, reference = [record.text], record.reference
    candidates = tuple(
        Candidate(CandidateKind.ROLLOUT, tuple(text.encode()), text, position) for position, text in enumerate(texts)
    )
    return Pool(index, record.prefix, reference, candidates)


def summarise(reading: str, set_name: str, groups: Sequence[Group], seed: int, prices: Prices | None) -> Result:
    """Observations to numbers with intervals."""
    seen = [observation for group in groups for observation in group.observations]
    correct = [observation.correct for observation in seen if observation.correct is not None]
    agreed = [observation.consistent for observation in seen if observation.consistent is not None]
    beliefs = [observation.first_option for observation in seen if observation.first_option is not None]
    scored = [(observation.score, observation.right) for observation in seen if observation.score is not None]
    return Result(
        reading=reading,
        set=set_name,
        records=len(seen),
        unanswered=len(seen) - len(correct),
        accuracy=wilson(sum(correct), len(correct)),
        auc=area_under_curve([s for s, right in scored if right], [s for s, right in scored if not right], seed=seed),
        consistency=wilson(sum(agreed), len(agreed)),
        position_bias=bootstrap_mean([belief - 0.5 for belief in beliefs], seed=seed),
        ties=correct.count(0.5),
        asked=sum(observation.asked for observation in seen),
        missing=dict(Counter(reason for observation in seen for reason in observation.missing)),
        cost=_cost(groups, seed, prices),
    )


def _cost(groups: Sequence[Group], seed: int, prices: Prices | None) -> Cost:
    """Sums, and ratios to the verdicts with groups resampled."""
    verdicts = [float(sum(observation.answered for observation in group.observations)) for group in groups]
    total = sum((group.spent for group in groups), Spent())

    def per_thousand(value: Callable[[Spent], float]) -> Estimate | None:
        return bootstrap_ratio([THOUSAND * value(group.spent) for group in groups], verdicts, seed=seed)

    metered = total.unmetered == 0
    return Cost(
        spent=total,
        calls=per_thousand(lambda spent: spent.calls),
        prompt_tokens=per_thousand(lambda spent: spent.prompt_tokens) if metered else None,
        answer_tokens=per_thousand(lambda spent: spent.answer_tokens) if metered else None,
        seconds=per_thousand(lambda spent: spent.seconds),
        money=per_thousand(prices.of) if metered and prices is not None else None,
    )
