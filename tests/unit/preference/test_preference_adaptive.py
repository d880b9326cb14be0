"""The adaptive plan: what holds for every pool, judge and answer; test_preference_adaptive_targets.py measures it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from megatron_sip.config.groups import PreferenceConfig
from megatron_sip.evaluation.simulated_judge import JudgeModel, SimulatedJudge
from megatron_sip.preference.adaptive import AdaptivePlan, AdaptiveSettings, adaptive_settings, plan_together
from megatron_sip.preference.combine import combine
from megatron_sip.preference.fitted import FittedScores
from megatron_sip.preference.rounds import next_rounds
from megatron_sip.preference.scoring import distinct, plan_scoring, pointwise
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Candidate, CandidateKind, Missing, MissingReason, Question, Verdict

QUALITY = JudgeSpec("quality", pairwise=True, weight=1.0)
SAME = JudgeSpec("quality", pairwise=True, weight=1.0, repeats=1)
READ = JudgeSpec("quality", pairwise=True, weight=1.0, answers="probabilities", repeats=1)
SAFETY = JudgeSpec("safety", pairwise=False, weight=1.0, votes=2)
LOST = Missing(MissingReason.TIMEOUT)

Ask = Callable[[Question], Verdict]


def plan_for(
    size: int, *judges: JudgeSpec, settings: AdaptiveSettings | None = None, seed: int = 1, sample_index: int = 0
) -> AdaptivePlan:
    single = tuple(question for judge in judges if not judge.pairwise for question in pointwise(size, judge))
    return AdaptivePlan(size, judges, single, settings or AdaptiveSettings(), seed, sample_index)


def follow(plan: AdaptivePlan, ask: Ask) -> list[list[Question]]:
    """Ask round after round until the plan is done; the rounds."""
    answers: Answers = {}
    rounds = []
    while questions := plan.next_round(answers):
        assert not set(questions) & set(answers), "a question that was asked is not asked again"
        assert len(set(questions)) == len(questions)
        answers |= {question: ask(question) for question in questions}
        rounds.append(questions)
    assert plan.next_round(answers) == [], "a plan that is done stays done"
    return rounds


def noisy(size: int, seed: int, model: JudgeModel | None = None) -> Ask:
    judge = SimulatedJudge(model or JudgeModel(), 1, size, seed)

    def ask(question: Question) -> Verdict:
        return judge.answer(0, [question])[question]

    return ask


def by_index(question: Question) -> Verdict:
    """A judge without noise, to whom the lower index is better."""
    assert question.second is not None
    return float(question.first < question.second)


def flat(rounds: list[list[Question]]) -> list[Question]:
    return [question for questions in rounds for question in questions]


@pytest.mark.parametrize("judge", [QUALITY, SAME, READ], ids=["votes", "same", "probabilities"])
@pytest.mark.parametrize("size", [2, 3, 4, 7, 12, 17, 18])
def test_budget_cap_and_rounds_are_kept(size: int, judge: JudgeSpec) -> None:
    settings = AdaptiveSettings(rounds=3, confidence=1.0)
    model = JudgeModel(probabilities=judge.answers == "probabilities", repeats_itself=judge.repeats == 1)
    rounds = follow(plan_for(size, judge, settings=settings), noisy(size, 3, model))
    questions = flat(rounds)
    assert 1 <= len(rounds) <= 3
    assert 0 < len(questions) <= min(8 * size, size * (size - 1) * judge.repeats)
    assert all(0 <= q.first < size and q.second is not None and 0 <= q.second < size for q in questions)
    assert all(q.first != q.second for q in questions)
    assert max(Counter((q.first, q.second) for q in questions).values()) <= judge.repeats
    for pair, votes in Counter((q.first, q.second) for q in questions).items():
        assert {q.vote for q in questions if (q.first, q.second) == pair} == set(range(votes))


@pytest.mark.parametrize(("budget", "rounds"), [(17, 1), (34, 2), (50, 4), (272, 6)])
def test_the_given_budget_is_spent_in_the_given_rounds(budget: int, rounds: int) -> None:
    settings = AdaptiveSettings(rounds=rounds, budget=budget, confidence=1.0)
    asked = [len(questions) for questions in follow(plan_for(17, QUALITY, settings=settings), noisy(17, 4))]
    assert sum(asked) == budget
    assert len(asked) == min(rounds, budget // 17)
    assert max(asked) - min(asked) <= 1, "rounds of equal size wait for the slowest answer least"


def test_the_plan_is_a_function_of_seed_sample_and_answers() -> None:
    first = follow(plan_for(9, QUALITY), noisy(9, 5))
    assert follow(plan_for(9, QUALITY), noisy(9, 5)) == first
    assert follow(plan_for(9, QUALITY, seed=2), noisy(9, 5)) != first
    assert follow(plan_for(9, QUALITY, sample_index=1), noisy(9, 5)) != first
    assert follow(plan_for(9, QUALITY), noisy(9, 6))[0] == first[0], "round 1 knows no answer"
    assert follow(plan_for(9, QUALITY), noisy(9, 6))[1] != first[1]


def test_the_order_in_which_answers_came_does_not_matter() -> None:
    plan, ask = plan_for(8, QUALITY), noisy(8, 5)
    answers: Answers = {question: ask(question) for question in plan.next_round({})}
    assert plan.next_round(dict(reversed(answers.items()))) == plan.next_round(answers)


def test_plans_worked_out_together_are_those_worked_out_alone() -> None:
    plans = [plan_for(size, QUALITY, sample_index=index) for index, size in enumerate([5, 17, 5, 9, 17, 5])]
    asks = [noisy(plan.size, plan.sample_index) for plan in plans]
    answers: list[Answers] = [{} for _ in plans]
    for _ in range(4):
        together = plan_together(plans, answers)
        assert together == [plan.next_round(given) for plan, given in zip(plans, answers, strict=True)]
        for given, ask, questions in zip(answers, asks, together, strict=True):
            given |= {question: ask(question) for question in questions}


def with_bonus(plan: AdaptivePlan, **of: float) -> AdaptivePlan:
    return replace(plan, bonus=tuple(of.get(f"c{index}", 0.0) for index in range(plan.size)))


def test_a_bonus_that_settles_an_end_leaves_the_questions_to_the_other() -> None:
    """0 is the best of the total by its bonus alone, whatever the judge says; only the worst is in doubt."""
    plan = plan_for(9, QUALITY)
    met: dict[bool, Counter[int]] = {True: Counter(), False: Counter()}
    for seed in range(12):
        for given in (True, False):
            own = with_bonus(plan, c0=5.0) if given else plan
            later = flat(follow(replace(own, sample_index=seed), noisy(9, seed))[1:])
            met[given] += Counter(index for q in later for index in (q.first, q.second))
    assert met[True][0] < 0.1 * met[False][0]


def test_plans_with_a_bonus_worked_out_together_are_those_worked_out_alone() -> None:
    plans = [plan_for(5, QUALITY, sample_index=index) for index in range(4)]
    plans[1], plans[3] = with_bonus(plans[1], c0=0.3), with_bonus(plans[3], c2=0.1)
    asks = [noisy(5, plan.sample_index) for plan in plans]
    answers: list[Answers] = [{} for _ in plans]
    for _ in range(4):
        together = plan_together(plans, answers)
        assert together == [plan.next_round(given) for plan, given in zip(plans, answers, strict=True)]
        for given, ask, questions in zip(answers, asks, together, strict=True):
            given |= {question: ask(question) for question in questions}


def test_round_1_spreads_over_the_pool_and_over_both_places() -> None:
    questions = plan_for(17, QUALITY).next_round({})
    met = Counter(index for q in questions for index in (q.first, q.second))
    assert len(met) == 17
    assert max(met.values()) - min(met.values()) <= 2
    assert max(Counter(frozenset((q.first, q.second)) for q in questions).values()) == 1
    ahead = Counter(q.first for q in questions)
    assert all(1 <= ahead[index] < met[index] for index in range(17)), "each is shown in either place"


def test_later_rounds_ask_about_best_and_worst() -> None:
    rounds = follow(plan_for(17, QUALITY, settings=AdaptiveSettings(confidence=1.0)), noisy(17, 8, JudgeModel(0.9)))
    judge = SimulatedJudge(JudgeModel(0.9), 1, 17, 8)
    rank = np.argsort(np.argsort(judge.utilities[0]))
    outer = [rank[index] in (0, 1, 2, 14, 15, 16) for q in rounds[-1] for index in (q.first, q.second or 0)]
    assert np.mean(outer) > 0.6, "the outer third of the candidates draws most of the last round"


def test_it_stops_early_when_best_and_worst_are_clear() -> None:
    asked = len(flat(follow(plan_for(8, QUALITY), by_index)))
    everything = AdaptiveSettings(confidence=1.0)
    noisy_asked = len(flat(follow(plan_for(8, QUALITY, settings=everything), noisy(8, 2, JudgeModel(0.6)))))
    assert asked < 64 == noisy_asked


def test_a_clear_end_is_not_asked_about_any_more() -> None:
    """Candidate 0 beats all, the others cannot be told apart: the last round is about the worst place only."""

    def ask(question: Question) -> Verdict:
        assert question.second is not None
        if 0 in (question.first, question.second):
            return float(question.first == 0)
        return float((question.first + question.second + question.vote) % 2)

    rounds = follow(plan_for(8, QUALITY, settings=AdaptiveSettings(budget=128)), ask)
    assert len(rounds) == 4
    assert not any(0 in (question.first, question.second) for question in rounds[-1])


def test_both_places_are_used_so_that_the_bias_is_known() -> None:
    questions = flat(follow(plan_for(6, QUALITY, settings=AdaptiveSettings(confidence=1.0)), noisy(6, 2)))
    pairs = Counter(frozenset((q.first, q.second)) for q in questions)
    for pair, count in pairs.items():
        first = min(pair, key=lambda index: index or 0)
        ahead = sum(q.first == first for q in questions if frozenset((q.first, q.second)) == pair)
        assert count < 4 or 0 < ahead < count


def test_swapped_labels_turn_best_and_worst() -> None:
    """A judge who likes what another dislikes: what was best for one is worst for the other."""
    truth = SimulatedJudge(JudgeModel(0.97), 1, 8, 21)

    def picks(ask: Ask) -> tuple[int, int]:
        plan = plan_for(8, QUALITY, settings=AdaptiveSettings(confidence=1.0))
        answers: Answers = {question: ask(question) for question in flat(follow(plan, ask))}
        total = np.array(combine(8, list(answers), answers, [QUALITY], 0.5, FittedScores()).total, dtype=float)
        return int(total.argmax()), int(total.argmin())

    def ask(question: Question) -> Verdict:
        return truth.answer(0, [question])[question]

    def opposite(question: Question) -> Verdict:
        verdict = ask(question)
        assert isinstance(verdict, float)
        return 1.0 - verdict

    assert picks(ask) == picks(opposite)[::-1]
    assert picks(ask) == (truth.utilities[0].argmax(), truth.utilities[0].argmin())


@pytest.mark.parametrize("judge", [QUALITY, READ], ids=["votes", "probabilities"])
def test_a_missing_answer_counts_as_asked_and_may_be_asked_for_again(judge: JudgeSpec) -> None:
    truth = noisy(3, 4, JudgeModel(probabilities=judge is READ))

    def ask(question: Question) -> Verdict:
        return LOST if question.vote == 0 and question.first == 1 else truth(question)

    questions = flat(follow(plan_for(3, judge, settings=AdaptiveSettings(confidence=1.0, rounds=6)), ask))
    votes = Counter((q.first, q.second) for q in questions)
    assert sum(votes.values()) <= 24
    assert max(votes.values()) <= judge.repeats + 1
    assert any(votes[pair] > 1 for pair in ((1, 0), (1, 2))), "the lost question is asked again as the next vote"
    if judge is READ:
        assert all(votes[pair] == 1 for pair in votes if pair[0] != 1)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_missing_answers_are_lived_with(share: float) -> None:
    rounds = follow(plan_for(9, QUALITY), noisy(9, 3, JudgeModel(missing=share)))
    assert 1 < len(rounds) <= 4
    assert len(flat(rounds)) <= 72


def test_an_outage_spends_the_budget_and_no_more() -> None:
    rounds = follow(plan_for(9, QUALITY, SAFETY), lambda _: LOST)
    assert len(rounds) <= 4
    assert sum(question.judge == "quality" for question in flat(rounds)) <= 72


def test_a_candidate_about_whom_nobody_answers_is_let_go() -> None:
    truth = noisy(9, 3)

    def ask(question: Question) -> Verdict:
        return LOST if 4 in (question.first, question.second) else truth(question)

    rounds = follow(plan_for(9, QUALITY, settings=AdaptiveSettings(confidence=1.0)), ask)
    assert any(4 in (q.first, q.second) for q in rounds[0])
    assert not any(4 in (q.first, q.second) for q in flat(rounds[1:]))


def test_pointwise_judges_are_asked_in_round_1_only() -> None:
    truth = noisy(6, 3)
    rounds = follow(plan_for(6, QUALITY, SAFETY), lambda q: 1.0 if q.judge == "safety" else truth(q))
    assert Counter(q.judge for q in rounds[0])["safety"] == 12
    assert len(rounds) > 1
    assert all(q.judge == "quality" for q in flat(rounds[1:]))


def test_scores_of_pointwise_judges_decide_who_is_in_doubt() -> None:
    """0 to 3 are unsafe: whatever the quality judge says, the best is among 4 to 7 and the worst among 0 to 3."""
    truth = noisy(8, 3, JudgeModel(0.6))
    safety = replace(SAFETY, weight=3.0)
    rounds = follow(
        plan_for(8, QUALITY, safety, settings=AdaptiveSettings(confidence=1.0)),
        lambda q: float(q.first > 3) if q.judge == "safety" else truth(q),
    )
    later = [q for q in flat(rounds[1:]) if q.second is not None]
    within = [(q.first > 3) == (q.second is not None and q.second > 3) for q in later]
    assert len(later) > 30
    assert np.mean(within) > 0.9, "candidates of one safety are compared with one another"


def test_a_candidate_without_a_pointwise_score_is_not_compared() -> None:
    truth = noisy(6, 3)

    def ask(question: Question) -> Verdict:
        if question.judge == "safety":
            return LOST if question.first == 2 else 1.0
        return truth(question)

    rounds = follow(plan_for(6, QUALITY, SAFETY, settings=AdaptiveSettings(confidence=1.0)), ask)
    assert len(rounds) > 1
    assert not any(2 in (q.first, q.second) for q in flat(rounds[1:]))


def test_two_pairwise_judges_are_each_asked_within_their_budget() -> None:
    style = JudgeSpec("style", pairwise=True, weight=0.5, repeats=1)
    one, other = noisy(7, 3), noisy(7, 4, JudgeModel(repeats_itself=True))

    def ask(question: Question) -> Verdict:
        plain = question._replace(judge="quality")
        return other(plain) if question.judge == "style" else one(plain)

    rounds = follow(plan_for(7, QUALITY, style, settings=AdaptiveSettings(confidence=1.0)), ask)
    counts = Counter(q.judge for q in flat(rounds))
    assert len(rounds) <= 4
    assert counts["quality"] == 56
    assert 0 < counts["style"] <= 42


def test_pointwise_judges_alone_are_one_round() -> None:
    assert len(follow(plan_for(4, SAFETY), lambda _: 1.0)) == 1


def test_an_ideal_judge_is_understood_in_every_pool() -> None:
    for size in range(2, 19):
        plan = plan_for(size, QUALITY, sample_index=size)
        answers: Answers = {question: by_index(question) for question in flat(follow(plan, by_index))}
        total = np.array(combine(size, list(answers), answers, [QUALITY], 0.5, FittedScores()).total, dtype=float)
        assert (total.argmax(), total.argmin()) == (0, size - 1)


def test_the_method_is_chosen_by_name() -> None:
    pool = [Candidate(CandidateKind.ROLLOUT, (index,), str(index), index) for index in range(5)]
    silent = JudgeSpec("factuality", pairwise=False, weight=0.0)
    settings = AdaptiveSettings(rounds=2)
    unique = distinct([*pool, pool[0]])
    judges = [QUALITY, silent, SAFETY]
    plan = plan_scoring("adaptive", pool, unique, judges, seed=1, sample_index=0, adaptive=settings)
    assert plan == plan_for(5, QUALITY, SAFETY, settings=settings)
    bonus = (0.2, 0.2, 0.0, 0.0, 0.0, 0.0)
    plan = plan_scoring("adaptive", [*pool, pool[0]], unique, judges, seed=1, sample_index=0, bonus=bonus)
    assert isinstance(plan, AdaptivePlan)
    assert plan.bonus == (0.2, 0.2, 0.0, 0.0, 0.0), "a copy has no place of its own"
    lone = plan_scoring("adaptive", pool[:1], distinct(pool[:1]), [QUALITY], seed=1, sample_index=0)
    assert lone.next_round({}) == []


def test_a_batch_of_several_methods_keeps_its_order() -> None:
    pool = [Candidate(CandidateKind.ROLLOUT, (index,), str(index), index) for index in range(5)]
    methods = ("adaptive", "all-pairs", "adaptive", "pivot")
    plans = [
        plan_scoring(method, pool, distinct(pool), [QUALITY], seed=1, sample_index=index)
        for index, method in enumerate(methods)
    ]
    assert next_rounds(plans, [{} for _ in plans]) == [plan.next_round({}) for plan in plans]


def test_settings_come_from_the_configuration() -> None:
    config = PreferenceConfig(adaptive_rounds=3, adaptive_budget=90, adaptive_confidence=0.8, min_answered_fraction=0.7)
    assert adaptive_settings(config) == AdaptiveSettings(3, 90, 0.8, 0.7)
    assert adaptive_settings(PreferenceConfig()) == AdaptiveSettings()


def test_small_pools_have_fewer_rounds() -> None:
    assert AdaptiveSettings().edges(2, SAME) == [0, 2]
    assert AdaptiveSettings().edges(17, QUALITY) == [0, 34, 68, 102, 136]
    assert AdaptiveSettings(rounds=4, budget=9).edges(4, QUALITY) == [0, 4, 9]
    pairs = len(list(combinations(range(3), 2)))
    assert AdaptiveSettings().edges(3, SAME)[-1] == 2 * pairs
