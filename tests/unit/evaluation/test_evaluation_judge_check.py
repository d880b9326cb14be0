"""A check against judges whose answers are known, to the exact number."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from megatron_sip.evaluation.intervals import wilson
from megatron_sip.evaluation.judge_check import CheckedReading, Prices, Result, Spent, check_reading
from megatron_sip.evaluation.judge_report import CheckReport, as_json, grids, markdown, remarks, silent
from megatron_sip.evaluation.labelled import Labelled, LabelledPair, LabelledText
from megatron_sip.evaluation.observations import observe_orders, observe_ranking, observe_text
from megatron_sip.types import Answers, Missing, MissingReason, Pool, Question, Verdict

QUALITY = CheckedReading("quality", "quality", "pair", pairwise=True, version="quality-1")
LIKELIHOOD = CheckedReading("likelihood", "likelihood", "pair", pairwise=False, version="likelihood-1")
SAFETY = CheckedReading("safety", "safety", "safety", pairwise=False, version="safety-1")
LOST = Missing(MissingReason.TIMEOUT)


class Judge:
    """Answers by `verdict(pool, question)`; each question is one call of 100 prompt and 2 answer tokens."""

    def __init__(self, verdict: Callable[[Pool, Question], Verdict]) -> None:
        self.verdict = verdict
        self.rounds: list[list[tuple[Pool, Question]]] = []

    def ask(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
        asked = [(pool, question) for pool, group in zip(pools, questions, strict=True) for question in group]
        self.rounds.append(asked)
        return [
            {question: self.verdict(pool, question) for question in group}
            for pool, group in zip(pools, questions, strict=True)
        ]

    def spent(self) -> Spent:
        calls = sum(map(len, self.rounds))
        return Spent(calls, 100 * calls, 2 * calls, 0)


class Clock:
    """Half a second passes between two looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def pairs(*names: str, set_name: str = "s") -> list[Labelled]:
    return [LabelledPair(set_name, name, f"good {name}", f"bad {name}") for name in names]


def by_name(beliefs: dict[str, tuple[Verdict, Verdict]]) -> Callable[[Pool, Question], Verdict]:
    """Belief in option 1 by prefix: where the good one stands first, and where the bad one does."""
    return lambda pool, question: beliefs[pool.prefix_text][question.first]


def results(reading: CheckedReading, records: Sequence[Labelled], judge: Judge, **options) -> dict[str, Result]:
    sets: dict[str, list[Labelled]] = {}
    for record in records:
        sets.setdefault(record.set, []).append(record)
    found = check_reading(reading, sets, judge, clock=Clock(), **options)
    return {f"{result.reading} | {result.set}": result for result in found}


BELIEFS: dict[str, tuple[Verdict, Verdict]] = {
    "right": (0.9, 0.2),  # good wins in both orders
    "wrong": (0.3, 0.8),  # bad wins in both
    "first": (0.9, 0.6),  # whoever stands first wins; the mean is with the good one
    "even": (0.8, 0.8),  # whoever stands first wins; the mean is with none
    "half": (0.7, LOST),  # one order only
    "none": (LOST, LOST),
}


def test_a_pairwise_judge_in_both_orders_by_hand() -> None:
    found = results(QUALITY, pairs(*BELIEFS), Judge(by_name(BELIEFS)), prices=Prices(3.0, 50.0))
    both = found["quality, both orders | s"]
    assert (both.records, both.unanswered, both.ties, both.asked) == (6, 1, 1, 12)
    assert both.missing == {"timeout": 3}
    assert both.accuracy == wilson(3.5, 5)  # right, first, half and the tie
    assert both.consistency == wilson(2, 4)
    # (0.9 + 0.2) / 2, (0.3 + 0.8) / 2, (0.9 + 0.6) / 2, 0.8
    assert both.position_bias.mean == pytest.approx((0.55 + 0.55 + 0.75 + 0.8) / 4 - 0.5)
    assert both.auc is None
    cost = both.cost
    assert cost.spent == Spent(12, 1200, 24, 0, 1.0)
    assert cost.calls.mean == 12 / 5 * 1000
    assert cost.prompt_tokens.mean == 1200 / 5 * 1000
    assert cost.answer_tokens.mean == 24 / 5 * 1000
    assert cost.seconds.mean == 1.0 / 5 * 1000
    assert cost.money.mean == pytest.approx((1200 * 3.0 + 24 * 50.0) / 1e6 / 5 * 1000)


def test_one_order_is_the_first_half_of_both() -> None:
    judge = Judge(by_name(BELIEFS))
    one = results(QUALITY, pairs(*BELIEFS), judge)["quality, one order | s"]
    first_round = {pool.prefix_text: question.first for pool, question in judge.rounds[0]}
    assert {first_round[name] for name in BELIEFS} == {0, 1}, "the seeded orders differ"
    seen = {name: BELIEFS[name][first] for name, first in first_round.items()}
    right = [
        (belief > 0.5) == (first_round[name] == 0) for name, belief in seen.items() if not isinstance(belief, Missing)
    ]
    assert one.accuracy == wilson(sum(right), len(right))
    assert (one.position_bias, one.consistency) == (None, None)
    assert one.cost.spent == Spent(6, 600, 12, 0, 0.5)
    alone = Judge(by_name(BELIEFS))
    again = results(replace(QUALITY, both_orders=False), pairs(*BELIEFS), alone)
    assert again == {"quality, one order | s": one}
    assert len(alone.rounds) == 1


def test_votes_are_averaged_and_each_is_a_question() -> None:
    votes = {0: 1.0, 1: 0.0, 2: 1.0}
    judge = Judge(lambda _pool, question: votes[question.vote] if question.first == 0 else 1 - votes[question.vote])
    found = results(replace(QUALITY, votes=3), pairs("a", "b"), judge)["quality, both orders | s"]
    assert found.asked == 12
    assert found.accuracy.mean == 1.0
    assert found.cost.calls.mean == 6000
    tied = results(replace(QUALITY, votes=2), pairs("a"), judge)["quality, both orders | s"]
    assert (tied.ties, tied.accuracy.mean, tied.consistency.mean) == (1, 0.5, 1.0)


def test_a_pointwise_judge_ranks_pairs_on_any_scale() -> None:
    scores = {"right": (2e-4, 1e-4), "wrong": (0.1, 0.2), "same": (0.3, 0.3), "lost": (0.3, LOST)}
    judge = Judge(lambda pool, question: scores[pool.prefix_text][question.first])
    found = results(LIKELIHOOD, pairs(*scores), judge)["likelihood | s"]
    assert found.accuracy == wilson(1.5, 3)
    assert (found.ties, found.unanswered, found.missing, found.asked) == (1, 1, {"timeout": 1}, 8)


def test_labelled_texts_have_an_accuracy_at_one_half_and_an_area() -> None:
    scores = {"a": 0.9, "b": 0.6, "c": 0.7, "d": 0.1, "e": 0.5, "f": LOST}
    labels = {"a": True, "b": True, "c": False, "d": False, "e": False, "f": True}
    texts: list[Labelled] = [LabelledText("s", "safety", text, right) for text, right in labels.items()]
    judge = Judge(lambda pool, question: scores[pool.candidates[question.first].text])
    found = results(SAFETY, texts, judge)["safety | s"]
    assert found.accuracy == wilson(3.5, 5)  # a, b, d, and e is a tie
    assert found.auc.mean == pytest.approx(5 / 6)  # b is below c
    assert (found.unanswered, found.ties) == (1, 1)


def test_sets_are_reported_each_and_together_and_groups_are_bounded() -> None:
    beliefs: dict[str, tuple[Verdict, Verdict]] = {str(n): (0.9, 0.1) if n < 4 else (0.1, 0.9) for n in range(7)}
    records = [*pairs("0", "1", "2", "3", set_name="x"), *pairs("4", "5", "6", set_name="y")]
    judge, done = Judge(by_name(beliefs)), []
    found = results(QUALITY, records, judge, group_size=3, on_progress=done.append)
    assert {name: result.accuracy.mean for name, result in found.items() if "both" in name} == {
        "quality, both orders | x": 1.0,
        "quality, both orders | y": 0.0,
        "quality, both orders | all sets": 4 / 7,
    }
    assert done == [3, 1, 3]
    assert [len(asked) for asked in judge.rounds] == [3, 3, 1, 1, 3, 3]
    everything = found["quality, both orders | all sets"]
    assert everything.cost.spent.calls == 14
    assert everything.cost.seconds.count == 3, "an interval over groups"
    assert len({pool.sample_index for asked in judge.rounds for pool, _ in asked}) == 7


def test_tokens_that_nobody_tells_are_not_reported_as_few() -> None:
    class Silent(Judge):
        def spent(self) -> Spent:
            return replace(super().spent(), unmetered=super().spent().calls)

    cost = results(QUALITY, pairs("right"), Silent(by_name(BELIEFS)), prices=Prices(1, 1))[
        "quality, one order | s"
    ].cost
    assert (cost.prompt_tokens, cost.answer_tokens, cost.money) == (None, None, None)
    assert cost.calls.mean == 1000


def test_an_answer_that_is_no_belief_is_refused() -> None:
    with pytest.raises(ValueError, match="not in"):
        observe_orders([float("nan")], [])
    with pytest.raises(ValueError, match="not in"):
        observe_text([1.5], True)
    assert observe_ranking([LOST], [0.2]).correct is None


def test_the_report_holds_every_number_and_says_what_is_missing() -> None:
    found = check_reading(QUALITY, {"s|t": pairs(*BELIEFS)}, Judge(by_name(BELIEFS)), clock=Clock())
    report = CheckReport("a-judge", "2026-01-02", tuple(found), {"quality": "quality-1"}, {"seed": 0}, None)
    right, cost = grids(report)
    assert [row[:3] for row in right.rows] == [("quality, one order", "s|t", "6"), ("quality, both orders", "s|t", "6")]
    assert right.rows[1][3].startswith("70.0 [")
    assert right.rows[1][-1] == "3 of 12"
    assert "money" not in cost.heads
    assert any("3 of 12 verdicts are missing (timeout 3); 1 records have none" in line for line in remarks(report))
    page = markdown(report)
    assert page.startswith("# Check of the judge a-judge on 2026-01-02\n")
    assert "s\\|t" in page
    assert json.loads(json.dumps(as_json(report), allow_nan=False))["results"][1]["accuracy"]["mean"] == 0.7


def test_a_reading_without_any_verdict_is_named() -> None:
    silence = Judge(lambda _pool, _question: LOST)
    found = check_reading(replace(QUALITY, both_orders=False), {"s": pairs("right")}, silence)
    assert silent(found) == ["quality, one order"]
    assert found[0].accuracy is None
    assert found[0].cost.calls is None
    assert found[0].cost.spent.calls == 1
    report = CheckReport(None, "d", tuple(found), {}, {}, None)
    assert grids(report)[1].rows[0][2:] == ("n/a",) * 4
    assert any(
        "1 records have none. In vain: 1 calls, 100 prompt and 2 answer tokens, " in line for line in remarks(report)
    )
