"""Compares arms (base, next-token training, SIP, ...) on the same prefixes, by judges that may fail to answer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from megatron_sip.evaluation.bootstrap import DEFAULT_RESAMPLES, Estimate, bootstrap_difference, bootstrap_mean
from megatron_sip.evaluation.text_measures import TextMeasures, measure_texts
from megatron_sip.types import (
    Answers,
    Candidate,
    CandidateKind,
    Missing,
    MissingReason,
    Pool,
    Question,
    Verdict,
)

PREFIXES_AT_ONCE = 16
SAME_BELIEF = 1e-9


class Ask(Protocol):
    """Puts questions to judges; `PreferenceServices.submit_answers(...).result()` is one."""

    def __call__(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
        """One `Answers` per pool, with an entry (a verdict or a Missing) for every question."""
        ...


@dataclass(frozen=True)
class Reader:
    """One way of reading one model's weights as a judge.

    `judge` is the name in `Question.judge`, `label` the name in the report, `weights` names the model,
    so that the report can tell whether the same weights scored the training. `scale` log reports the
    mean of the logarithm of a score, as for the likelihood judge (nats per token). A question is asked `votes` times,
    and the mean of the votes that were given is the verdict.
    """

    judge: str
    label: str
    weights: str
    pairwise: bool
    scale: Literal["plain", "log"] = "plain"
    votes: int = 1


@dataclass(frozen=True)
class WinRate:
    """How often an arm beats base, over prefixes.

    `belief` is the mean over prefixes of the mean belief in the arm over the answered option orders; `estimate`
    counts a prefix as won where that belief is above one half, as half won where it is one half. For verdicts of
    0 and 1 the two differ only where the orders contradict each other; a probability read from a token may lean
    one way on most prefixes and yet stay near one half on each.
    `identical` prefixes, on which both wrote the same text, count as half a win without being asked.
    `unanswered` prefixes have no verdict in either order and are in no mean; `one_order` were answered
    in one order only, so the judge's position bias is not averaged out there.
    """

    estimate: Estimate | None
    belief: Estimate | None
    identical: int
    unanswered: int
    one_order: int
    missing: dict[str, int]


@dataclass(frozen=True)
class PointScore:
    """A pointwise score of an arm, and its paired difference to base on the prefixes that have both."""

    estimate: Estimate | None
    over_base: Estimate | None
    missing: dict[str, int]


@dataclass(frozen=True)
class ArmResult:
    """What is known of one arm; `win_rates` is empty for base. Keys are labels of readers."""

    win_rates: dict[str, WinRate]
    scores: dict[str, PointScore]
    texts: TextMeasures


@dataclass(frozen=True)
class Comparison:
    """All arms on one set of prefixes.

    `first_option_share[label]` is the mean belief of a pairwise reader that option 1 wins, over the
    pairs answered in both orders: 0.5 without position bias.
    """

    prefixes: int
    base: str
    arms: dict[str, ArmResult]
    readers: tuple[Reader, ...]
    first_option_share: dict[str, float | None]


def compare_arms(
    prefixes: Sequence[str],
    arms: Mapping[str, Sequence[str]],
    readers: Sequence[Reader],
    ask: Ask,
    *,
    base: str = "base",
    originals: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = DEFAULT_RESAMPLES,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare the continuations of `arms` (`arms[name][i]` continues `prefixes[i]`) with those of `base`.

    Pairwise readers see (arm, base) in both orders, pointwise readers each distinct text once.
    `originals` are the human continuations, which the factuality judge needs. Prefixes are asked about in
    groups; `on_progress(done, all)` is called after each. ValueError where the inputs do not fit together.
    """
    _check(prefixes, arms, readers, base, originals)
    pools, places = _pools(prefixes, arms, base, originals)
    questions = [_questions(place, base, readers) for place in places]
    answers: list[Answers] = []
    for start in range(0, len(pools), PREFIXES_AT_ONCE):
        stop = min(start + PREFIXES_AT_ONCE, len(pools))
        part = ask(pools[start:stop], questions[start:stop])
        for group, given in zip(questions[start:stop], part, strict=True):
            lost = [question for question in group if question not in given]
            if lost:
                raise ValueError(f"{lost[0]} was asked but has neither a verdict nor a Missing")
        answers += part
        if on_progress is not None:
            on_progress(stop, len(pools))
    statistics = _Statistics(base, places, answers, seed, resamples)
    results = {
        arm: ArmResult(
            win_rates={r.label: statistics.win_rate(arm, r) for r in readers if r.pairwise and arm != base},
            scores={r.label: statistics.score(arm, r) for r in readers if not r.pairwise},
            texts=measure_texts(texts),
        )
        for arm, texts in arms.items()
    }
    shares = {r.label: statistics.first_option_share(r) for r in readers if r.pairwise}
    return Comparison(len(prefixes), base, results, tuple(readers), shares)


@dataclass(frozen=True)
class _Statistics:
    """Answers to numbers. `places[i][arm]` is the index of an arm's text in the pool of prefix i."""

    base: str
    places: Sequence[Mapping[str, int]]
    answers: Sequence[Answers]
    seed: int
    resamples: int

    def win_rate(self, arm: str, reader: Reader) -> WinRate:
        values: list[float] = []
        identical, unanswered, one_order = 0, 0, 0
        missing: Counter[str] = Counter()
        for place, answers in zip(self.places, self.answers, strict=True):
            mine, other = place[arm], place[self.base]
            if mine == other:
                identical += 1
                values.append(0.5)
                continue
            votes = [_votes(answers, reader, *order) for order in ((mine, other), (other, mine))]
            missing += _reasons([*votes[0], *votes[1]])
            as_first, as_second = map(_mean, votes)
            wins = [] if isinstance(as_first, Missing) else [as_first]
            wins += [] if isinstance(as_second, Missing) else [1.0 - as_second]
            if wins:
                values.append(sum(wins) / len(wins))
            one_order += len(wins) == 1
            unanswered += not wins
        won = [0.5 if abs(value - 0.5) <= SAME_BELIEF else float(value > 0.5) for value in values]
        estimate = bootstrap_mean(won, seed=self.seed, resamples=self.resamples)
        belief = bootstrap_mean(values, seed=self.seed, resamples=self.resamples)
        return WinRate(estimate, belief, identical, unanswered, one_order, dict(missing))

    def score(self, arm: str, reader: Reader) -> PointScore:
        votes = self._pointwise(arm, reader)
        reference = None if arm == self.base else list(map(_mean, self._pointwise(self.base, reader)))
        found = point_score(list(map(_mean, votes)), reference, self.seed, self.resamples)
        return replace(found, missing=dict(_reasons([vote for own in votes for vote in own])))

    def _pointwise(self, arm: str, reader: Reader) -> list[list[Verdict]]:
        """The votes on the arm's text of each prefix, on the scale of the reader."""
        found = []
        for place, answers in zip(self.places, self.answers, strict=True):
            votes = _votes(answers, reader, place[arm])
            found.append(list(map(_logarithm, votes)) if reader.scale == "log" else votes)
        return found

    def first_option_share(self, reader: Reader) -> float | None:
        values = []
        for place, answers in zip(self.places, self.answers, strict=True):
            for arm_place in sorted(set(place.values()) - {place[self.base]}):
                pair = (arm_place, place[self.base])
                both = [_mean(_votes(answers, reader, *order)) for order in (pair, pair[::-1])]
                values += [v for v in both if not isinstance(v, Missing)] if not _any_missing(both) else []
        return sum(values) / len(values) if values else None


def point_score(
    verdicts: Sequence[Verdict], base_verdicts: Sequence[Verdict] | None, seed: int, resamples: int
) -> PointScore:
    """The mean over the verdicts that are there, and the paired difference to base where both are."""
    present = [verdict for verdict in verdicts if not isinstance(verdict, Missing)]
    difference = None
    if base_verdicts is not None:
        pairs = [
            (mine, other)
            for mine, other in zip(verdicts, base_verdicts, strict=True)
            if not isinstance(mine, Missing) and not isinstance(other, Missing)
        ]
        difference = bootstrap_difference(
            [mine for mine, _ in pairs], [other for _, other in pairs], seed=seed, resamples=resamples
        )
    return PointScore(bootstrap_mean(present, seed=seed, resamples=resamples), difference, dict(_reasons(verdicts)))


def _any_missing(verdicts: Sequence[Verdict]) -> bool:
    return any(isinstance(verdict, Missing) for verdict in verdicts)


def _votes(answers: Answers, reader: Reader, first: int, second: int | None = None) -> list[Verdict]:
    """All votes on one question."""
    asked = (Question(reader.judge, first, second, vote) for vote in range(reader.votes))
    return [_verdict(answers[question], probability=reader.scale == "plain") for question in asked]


def _mean(votes: Sequence[Verdict]) -> Verdict:
    """The mean of the votes that were given; why the first is missing where none was."""
    given = [vote for vote in votes if not isinstance(vote, Missing)]
    return sum(given) / len(given) if given else votes[0]


def _reasons(verdicts: Sequence[Verdict]) -> Counter[str]:
    return Counter(verdict.reason.value for verdict in verdicts if isinstance(verdict, Missing))


def _logarithm(verdict: Verdict) -> Verdict:
    if isinstance(verdict, Missing):
        return verdict
    if verdict <= 0:
        return Missing(MissingReason.MALFORMED, f"a score of {verdict} has no logarithm")
    return math.log(verdict)


def _verdict(value: Verdict, *, probability: bool) -> Verdict:
    """The verdict, or a Missing for a number that is none: a judge's answer is not trusted."""
    if isinstance(value, Missing):
        return value
    if not math.isfinite(value) or (probability and not 0.0 <= value <= 1.0):
        return Missing(MissingReason.MALFORMED, f"the verdict {value} is out of range")
    return value


def _check(
    prefixes: Sequence[str],
    arms: Mapping[str, Sequence[str]],
    readers: Sequence[Reader],
    base: str,
    originals: Sequence[str] | None,
) -> None:
    if base not in arms:
        raise ValueError(f"the arm {base!r} to compare with is not among {sorted(arms)}")
    for name, texts in arms.items():
        if len(texts) != len(prefixes):
            raise ValueError(f"arm {name!r} has {len(texts)} continuations for {len(prefixes)} prefixes")
    if len({reader.label for reader in readers}) != len(readers):
        raise ValueError("two readers have the same label")
    if originals is None and any(reader.judge == "factuality" for reader in readers):
        raise ValueError("the factuality judge compares with the human continuations: pass originals")
    if originals is not None and len(originals) != len(prefixes):
        raise ValueError(f"{len(originals)} originals for {len(prefixes)} prefixes")


def _pools(
    prefixes: Sequence[str], arms: Mapping[str, Sequence[str]], base: str, originals: Sequence[str] | None
) -> tuple[list[Pool], list[dict[str, int]]]:
    """One pool of distinct texts per prefix, base first, and the place of every arm in it.

    A candidate's `tokens` are the bytes of its text: they only say which candidates are the same.
    """
    pools, places = [], []
    for index, prefix in enumerate(prefixes):
        place: dict[str, int] = {}
        texts: list[str] = []
        for arm in [base, *(name for name in arms if name != base)]:
            text = arms[arm][index]
            if text not in texts:
                texts.append(text)
            place[arm] = texts.index(text)
        candidates = tuple(
            Candidate(CandidateKind.ROLLOUT, tuple(text.encode("utf-8", "surrogatepass")), text, position)
            for position, text in enumerate(texts)
        )
        pools.append(Pool(index, prefix, "" if originals is None else originals[index], candidates))
        places.append(place)
    return pools, places


def _questions(place: Mapping[str, int], base: str, readers: Sequence[Reader]) -> list[Question]:
    everyone = sorted(set(place.values()))
    questions: dict[Question, None] = {}
    for reader in readers:
        shown: list[tuple[int, int | None]] = [(index, None) for index in everyone]
        if reader.pairwise:
            others = [index for index in everyone if index != place[base]]
            shown = [pair for index in others for pair in ((index, place[base]), (place[base], index))]
        questions |= dict.fromkeys(
            Question(reader.judge, *pair, vote) for pair in shown for vote in range(reader.votes)
        )
    return list(questions)
