"""What a screen by safety does to the pick: simulated pools with and without it, by the same verdicts.

17 candidates with normal utilities, each unsafe with probability 0.2 whatever its utility. The quality judge is a
Bradley-Terry judge whose single vote on two random candidates is right three times of four; the safety judge takes 5 %
of the unsafe for safe and 2 % of the safe for unsafe. Both have weight 1, and T is 0.5. The true value of a candidate
is its true mean win rate plus 1 if it is safe.

The page on judges quotes what this prints.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from megatron_sip.preference.combine import combine
from megatron_sip.preference.scoring import JudgeSpec, OneRound, ScoringPlan, all_pairs
from megatron_sip.preference.screen import Screen, ScreenedPlan, screened_scores
from megatron_sip.types import Answers, Candidate, CandidateKind, Question, Scores

SIZE, POOLS, SHARPNESS = 17, 400, 1.47  # logit of a vote = SHARPNESS * (u_i - u_j): right for 75 % of random pairs
Q = JudgeSpec("quality", pairwise=True, weight=1.0)
S = JudgeSpec("safety", pairwise=False, weight=1.0, tells_safety=True)
CANDIDATES = [Candidate(CandidateKind.ROLLOUT, (index, 1, 2, 3, 4), "", index) for index in range(SIZE)]


def verdicts_of(utility: np.ndarray, safe: np.ndarray, generator: np.random.Generator, sample: int) -> Answers:
    """A verdict on everything that could be asked."""
    said = np.where(safe, generator.random(SIZE) >= 0.02, generator.random(SIZE) < 0.05)
    answers: Answers = {Question("safety", index): float(said[index]) for index in range(SIZE)}
    for question in all_pairs(SIZE, Q, seed=1, sample_index=sample):
        assert question.second is not None
        chance = 1 / (1 + math.exp(-SHARPNESS * (utility[question.first] - utility[question.second])))
        answers[question] = float(generator.random() < chance)
    return answers


def run(plan: ScoringPlan, known: Answers, stopped_by: Screen) -> tuple[Scores, int]:
    """Scores, and how many comparisons they took. A pair is known in one order, whichever a plan asks."""
    answers: Answers = {}
    while questions := plan.next_round(answers):
        for question in questions:
            turned = question._replace(first=question.second or 0, second=question.first)
            answers[question] = known[question] if question in known else 1 - known[turned]  # type: ignore[operator]
    stopped = stopped_by.stopped(CANDIDATES, answers, (Q, S))
    scores = screened_scores(stopped, SIZE, list(answers), answers, (Q, S), partial(combine, min_answered_fraction=0.5))
    return scores, sum(question.second is not None for question in answers)


def best_and_worst(scores: Scores, generator: np.random.Generator) -> tuple[int, int]:
    """Ties are drawn, as in training."""
    total = np.array(scores.total, dtype=float)
    best, worst = np.flatnonzero(total >= total.max() - 1e-9), np.flatnonzero(total <= total.min() + 1e-9)
    return int(generator.choice(best)), int(generator.choice(worst))


def test_a_screen_by_safety_keeps_the_best_and_blurs_the_worst() -> None:
    screen = Screen(safety_below=0.5)
    same_best, bests, worsts, unsafe_worst, calls = [], [], [], [], []
    for sample in range(POOLS):
        generator = np.random.default_rng([7, sample])
        utility, safe = generator.normal(size=SIZE), generator.random(SIZE) >= 0.2
        known = verdicts_of(utility, safe, generator, sample)
        wins = 1 / (1 + np.exp(-SHARPNESS * (utility[:, None] - utility[None, :])))
        value = (wins.sum(axis=1) - 0.5) / (SIZE - 1) + safe

        def inner(members: tuple[int, ...], sample: int = sample) -> ScoringPlan:
            return OneRound(tuple(all_pairs(len(members), Q, seed=1, sample_index=sample)))

        everything = OneRound(tuple(known))
        full, full_calls = run(everything, known, Screen())
        spared, spared_calls = run(ScreenedPlan(screen, CANDIDATES, (Q, S), inner), known, screen)
        picks = [best_and_worst(scores, generator) for scores in (full, spared)]
        same_best.append(picks[0][0] == picks[1][0])
        bests.append([value[best] for best, _ in picks])
        worsts.append([value[worst] for _, worst in picks])
        unsafe_worst.append([not safe[worst] for _, worst in picks])
        calls.append([full_calls, spared_calls])
    means = [np.mean(found, axis=0) for found in (bests, worsts, unsafe_worst, calls)]
    best, worst, unsafe, asked = means
    margin = best - worst
    print(f"\nsame best {np.mean(same_best):.3f}; without and with: chosen, rejected, unsafe rejected, comparisons")
    print(np.round(means, 3))
    assert asked[0] == 136
    assert asked[1] < 0.7 * asked[0]
    assert np.mean(same_best) > 0.75
    assert best[1] > 0.98 * best[0]
    # The stopped are equal in the eyes of the quality judge, so the worst of them is a draw.
    assert 0.85 < margin[1] / margin[0] < 0.95
    assert unsafe[1] >= unsafe[0] - 0.02
