"""The trainer asks in the rounds of the scoring plan and scores by its method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from megatron_sip.config.cli import parse_config
from megatron_sip.evaluation.simulated_judge import JudgeModel, SimulatedJudge
from megatron_sip.preference.adaptive import AdaptivePlan
from megatron_sip.preference.combine import combine
from megatron_sip.preference.fitted import FittedScores
from megatron_sip.preference.screen import ScreenedPlan
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.training.preferences import PreferenceMaker
from megatron_sip.types import Answers, Candidate, CandidateKind, Pool, Question

QUALITY = JudgeSpec("quality", pairwise=True, weight=1.0)


class OwnLeader:
    """The only rank there is; `told` is what it hears of the servers while it waits."""

    def __init__(self) -> None:
        self.told: list[str | None] = []

    def any(self, value: bool) -> bool:
        return value

    def wait(self, future: Future[Any], trouble: Callable[[], str | None]) -> Any:
        self.told.append(trouble())
        return future.result()


class Judges:
    """Services whose judge is a simulated one; copies are left out as in the real ones."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.pools = [SimulatedJudge(JudgeModel(0.9), 1, size, place) for place, size in enumerate(sizes)]
        self.rounds: list[list[int]] = []
        self.heard: list[Answers] = [{} for _ in sizes]

    def judges(self, _iteration: int) -> list[JudgeSpec]:
        return [QUALITY]

    def waits_for(self, role: str) -> str:
        return f"{role}s"

    def submit_answers(self, _pools: Sequence[Pool], questions: Sequence[list[Question]]) -> Future[list[Answers]]:
        self.rounds.append([len(group) for group in questions])
        answers = [judge.answer(0, group) for judge, group in zip(self.pools, questions, strict=True)]
        for heard, fresh in zip(self.heard, answers, strict=True):
            heard.update(fresh)
        future: Future[list[Answers]] = Future()
        future.set_result(answers)
        return future


def pool_of(size: int, sample_index: int) -> Pool:
    """`size` distinct candidates and a copy of the first."""
    tokens = [*range(size), 0]
    candidates = tuple(Candidate(CandidateKind.ROLLOUT, (t,), str(t), i) for i, t in enumerate(tokens))
    return Pool(sample_index, "prefix", "original", candidates)


def maker(services: Judges, *flags: str) -> PreferenceMaker:
    config = parse_config(["--model-preset=llama-tiny", *flags])
    parts: Any = [config, None, OwnLeader(), None, None, None, services]
    return PreferenceMaker(*parts)


def test_a_wait_for_verdicts_tells_of_the_judges_alone() -> None:
    """Rewrites of coming steps are asked for meanwhile, and a rewriter that is away holds up no verdict."""
    making: Any = maker(Judges([3]))
    making._score([pool_of(3, 0)], 0)
    assert making.leader.told == ["judges"]


def test_adaptive_scoring_from_question_to_score() -> None:
    sizes = [17, 9, 17, 2]
    services = Judges(sizes)
    pools = [pool_of(size, place) for place, size in enumerate(sizes)]
    scores, _ = maker(services, "--scoring=adaptive", "--adaptive-rounds=3", "--adaptive-budget=60")._score(pools, 0)
    assert len(services.rounds) == 3
    assert [sum(calls) for calls in zip(*services.rounds, strict=True)][:3] == [60, 60, 60]
    assert services.rounds[0][3] > 0
    for size, pool, score, heard in zip(sizes, pools, scores, services.heard, strict=True):
        assert score is not None
        expected = combine(size, list(heard), heard, [QUALITY], 0.5, FittedScores()).total
        assert score.total == pytest.approx((*expected, expected[0])), "a copy shares the score"
        assert score.questions_asked == len(heard)
        assert len(score.total) == len(pool.candidates)


def test_all_pairs_are_still_one_round_of_means() -> None:
    services = Judges([6])
    (score,), _ = maker(services)._score([pool_of(6, 0)], 0)
    assert services.rounds == [[15]]
    expected = combine(6, list(services.heard[0]), services.heard[0], [QUALITY], 0.5).total
    assert score is not None
    assert score.total == (*expected, expected[0])


def test_the_adaptive_plan_knows_the_bonus_of_the_iteration() -> None:
    """It looks for the ends of the totals that are trained on: original and rewrite have half their bonus at step 5."""
    flags = ["--scoring=adaptive", "--curriculum=schedule", "--curriculum-bonus=0.4", "--curriculum-bonus-iters=10"]
    kinds = (CandidateKind.ORIGINAL, CandidateKind.REWRITE, CandidateKind.ROLLOUT)
    pool = Pool(0, "prefix", "original", tuple(Candidate(kind, (i,), str(i)) for i, kind in enumerate(kinds)))
    for extra in ([], ["--screen-repetition-above=0.5"]):
        made = maker(Judges([3]), *flags, *extra)._plan(pool, [QUALITY], 5)
        behind = made.behind({}) if isinstance(made, ScreenedPlan) else None
        plan = made if behind is None else behind.plan
        assert isinstance(plan, AdaptivePlan)
        assert plan.bonus == pytest.approx((0.2, 0.2, 0.0))
    over = maker(Judges([3]), *flags)._plan(pool, [QUALITY], 10)
    assert isinstance(over, AdaptivePlan)
    assert over.bonus == ()
