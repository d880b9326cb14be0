"""A step's scoring with screens and several judges: rounds, scores and the metrics of its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from ask_rounds import ask_rounds

from megatron_sip.config.groups import Config, JudgeConfig, PreferenceConfig
from megatron_sip.metrics.names import metric_specs
from megatron_sip.services.build import judge_specs
from megatron_sip.training.scoring import PoolScoring, verdict_metrics
from megatron_sip.types import Answers, Candidate, CandidateKind, Pool, Question

UNSAFE, LOOP = (9, 1, 2, 3, 4, 5), (1, 2, 1, 2, 1, 2, 1, 2)
TOKENS = [(1, 2, 3, 4, 5), UNSAFE, LOOP, (2, 3, 4, 5, 6), (3, 4, 5, 6, 7), (1, 2, 3, 4, 5)]
POOL = Pool(3, "prefix", "original", tuple(Candidate(CandidateKind.ROLLOUT, t, str(t)) for t in TOKENS))


class Judges:
    """Answers at once: unsafe is what begins with 9, the lower first token wins by 0.8, the first option gets 0.1."""

    def __init__(self) -> None:
        self.rounds: list[list[Question]] = []

    def answer(self, pools: Sequence[Pool], questions: Sequence[Sequence[Question]]) -> list[Answers]:
        self.rounds.append([question for group in questions for question in group])
        seen: list[tuple[int, ...]] = list(dict.fromkeys(c.tokens for c in pools[0].candidates))
        return [{q: self.verdict(seen, q) for q in group} for group in questions]

    def verdict(self, seen: list[tuple[int, ...]], question: Question) -> float:
        if question.second is None:
            return float(seen[question.first][0] != 9)
        return 0.9 if seen[question.first] < seen[question.second] else 0.3


def score(config: Config) -> tuple[Any, dict[str, tuple[float, float]], Judges]:
    judges, specs = Judges(), judge_specs(config)
    scored = ask_rounds(PoolScoring(config, specs, 0, [POOL], [[]]), judges.answer)
    [scores] = scored.scores
    return scores, verdict_metrics(config, scored, specs), judges


def config_of(judge: JudgeConfig, **preference: Any) -> Config:
    return Config(judge=judge, preference=PreferenceConfig(**preference))


JUDGE = JudgeConfig(judge_url=("http://127.0.0.1:9/v1",), safety_weight=1.0, judge_option_order="both")


def test_without_a_screen_all_is_asked_at_once() -> None:
    scores, metrics, judges = score(config_of(JUDGE))
    assert [len(questions) for questions in judges.rounds] == [5 * 4 + 5]
    assert metrics["candidates/screened"] == (0.0, 1.0)
    assert metrics["judge/position_bias"] == (pytest.approx(0.1 * 20), 20)
    assert metrics["judge/order_consistency/quality"] == (10.0, 10)
    assert set(metrics) <= {spec.name for spec in metric_specs(["quality", "safety"], ["quality"])}
    assert scores.total[0] == scores.total[5], "copies share a score"


def test_a_screen_spares_the_comparisons_of_whom_it_stops() -> None:
    scores, metrics, judges = score(config_of(JUDGE, screen_safety_below=0.5, screen_repetition_above=0.5))
    assert [len(questions) for questions in judges.rounds] == [5, 3 * 2]
    assert all(question.second is None for question in judges.rounds[0])
    assert not {1, 2} & {index for q in judges.rounds[1] for index in (q.first, q.second)}
    assert metrics["candidates/screened"] == (2.0, 1.0)
    # In both orders the winner has (0.9 + 0.7) / 2 = 0.8. 0 beats 3 and 4; 3 beats 4.
    assert scores.by_judge["quality"] == pytest.approx((0.8, 0.0, 0.0, 0.5, 0.2, 0.8))
    assert scores.total == pytest.approx((1.8, 0.0, 1.0, 1.5, 1.2, 1.8))
    assert scores.questions_asked == 11


def test_adaptive_scoring_works_behind_a_screen() -> None:
    screen = {"screen_safety_below": 0.5, "screen_repetition_above": 0.5}
    scores, metrics, judges = score(config_of(JUDGE, scoring="adaptive", **screen))
    assert all(question.second is None for question in judges.rounds[0])
    compared = [question for questions in judges.rounds[1:] for question in questions]
    assert compared
    assert not {1, 2} & {index for q in compared for index in (q.first, q.second)}
    assert (scores.by_judge["quality"][1], scores.by_judge["quality"][2]) == (0.0, 0.0)
    first, second, third = (scores.by_judge["quality"][index] for index in (0, 3, 4))
    assert first > second > third
    assert scores.total[1] == pytest.approx(0.0)
    assert metrics["judge/position_bias_logits"][1] > 0
    assert set(metrics) <= {spec.name for spec in metric_specs(["quality", "safety"], ["quality"])}
