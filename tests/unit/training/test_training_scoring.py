"""The trainer asks in the rounds of the scoring plan and scores by its method."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from ask_rounds import ask_rounds

from megatron_sip.config.cli import parse_config
from megatron_sip.evaluation.simulated_judge import JudgeModel, SimulatedJudge
from megatron_sip.preference.adaptive import AdaptivePlan
from megatron_sip.preference.combine import combine
from megatron_sip.preference.fitted import FittedScores
from megatron_sip.preference.screen import ScreenedPlan
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.training.scoring import PoolScoring
from megatron_sip.types import Answers, Candidate, CandidateKind, Pool, Question

QUALITY = JudgeSpec("quality", pairwise=True, weight=1.0)


class Judges:
    """A simulated judge of several pools; copies are left out as in the services."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.pools = [SimulatedJudge(JudgeModel(0.9), 1, size, place) for place, size in enumerate(sizes)]
        self.rounds: list[list[int]] = []
        self.heard: list[Answers] = [{} for _ in sizes]

    def answer(self, _pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
        self.rounds.append([len(group) for group in questions])
        answers = [judge.answer(0, list(group)) for judge, group in zip(self.pools, questions, strict=True)]
        for heard, fresh in zip(self.heard, answers, strict=True):
            heard.update(fresh)
        return answers


def pool_of(size: int, sample_index: int) -> Pool:
    """`size` distinct candidates and a copy of the first."""
    tokens = [*range(size), 0]
    candidates = tuple(Candidate(CandidateKind.ROLLOUT, (t,), str(t), i) for i, t in enumerate(tokens))
    return Pool(sample_index, "prefix", "original", candidates)


def scoring(pools: list[Pool], *flags: str, iteration: int = 0) -> PoolScoring:
    config = parse_config(["--model-preset=llama-tiny", *flags])
    return PoolScoring(config, [QUALITY], iteration, pools, [[] for _ in pools])


def test_adaptive_scoring_from_question_to_score() -> None:
    sizes = [17, 9, 17, 2]
    judges = Judges(sizes)
    pools = [pool_of(size, place) for place, size in enumerate(sizes)]
    rounds = scoring(pools, "--scoring=adaptive", "--adaptive-rounds=3", "--adaptive-budget=60")
    scored = ask_rounds(rounds, judges.answer)
    assert len(judges.rounds) == 3
    assert [sum(calls) for calls in zip(*judges.rounds, strict=True)][:3] == [60, 60, 60]
    assert judges.rounds[0][3] > 0
    for size, pool, score, heard in zip(sizes, pools, scored.scores, judges.heard, strict=True):
        assert score is not None
        expected = combine(size, list(heard), heard, [QUALITY], 0.5, FittedScores()).total
        assert score.total == pytest.approx((*expected, expected[0])), "a copy shares the score"
        assert score.questions_asked == len(heard)
        assert len(score.total) == len(pool.candidates)


def test_all_pairs_are_still_one_round_of_means() -> None:
    judges = Judges([6])
    [score] = ask_rounds(scoring([pool_of(6, 0)]), judges.answer).scores
    assert judges.rounds == [[15]]
    expected = combine(6, list(judges.heard[0]), judges.heard[0], [QUALITY], 0.5).total
    assert score is not None
    assert score.total == (*expected, expected[0])


def test_the_adaptive_plan_knows_the_bonus_of_the_iteration() -> None:
    """It looks for the ends of the totals that are trained on: original and rewrite have half their bonus at step 5."""
    flags = ["--scoring=adaptive", "--curriculum=schedule", "--curriculum-bonus=0.4", "--curriculum-bonus-iters=10"]
    kinds = (CandidateKind.ORIGINAL, CandidateKind.REWRITE, CandidateKind.ROLLOUT)
    pool = Pool(0, "prefix", "original", tuple(Candidate(kind, (i,), str(i)) for i, kind in enumerate(kinds)))
    for extra in ([], ["--screen-repetition-above=0.5"]):
        [made] = scoring([pool], *flags, *extra, iteration=5)._plans
        behind = made.behind({}) if isinstance(made, ScreenedPlan) else None
        plan = made if behind is None else behind.plan
        assert isinstance(plan, AdaptivePlan)
        assert plan.bonus == pytest.approx((0.2, 0.2, 0.0))
    [over] = scoring([pool], *flags, iteration=10)._plans
    assert isinstance(over, AdaptivePlan)
    assert over.bonus == ()
