"""Scores to pairs: ties, missing scores, copies and the objectives without a judge."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_sip.config.groups import Objective
from megatron_sip.preference.select import best_only, choose, needs_scores, select_pair
from megatron_sip.types import (
    Candidate,
    CandidateKind,
    Missing,
    MissingReason,
    NoPair,
    NoPairReason,
    Pair,
    Pool,
    Scores,
    Verdict,
)

GONE = Missing(MissingReason.TOO_FEW_ANSWERS)
ORIGINAL = Candidate(CandidateKind.ORIGINAL, (1, 2), "original")
REWRITE = Candidate(CandidateKind.REWRITE, (3, 4), "rewrite")


def rollout(index: int, *tokens: int) -> Candidate:
    return Candidate(CandidateKind.ROLLOUT, tokens, f"rollout {index}", index)


def pool(*candidates: Candidate, sample_index: int = 0) -> Pool:
    return Pool(sample_index, "prefix", "original", candidates)


def scores(*total: Verdict) -> Scores:
    return Scores(total, {})


FOUR = (ORIGINAL, rollout(0, 5), rollout(1, 6), rollout(2, 7))


def test_best_over_worst_with_their_scores() -> None:
    pair = select_pair(pool(*FOUR), scores(0.5, 0.25, 1.0, 0.75), seed=1)
    assert pair == Pair(FOUR[2], FOUR[1], chosen_score=1.0, rejected_score=0.25)


def test_a_missing_score_is_neither_best_nor_worst() -> None:
    pair = select_pair(pool(*FOUR), scores(GONE, 0.5, GONE, 0.25), seed=1)
    assert pair == Pair(FOUR[1], FOUR[3], chosen_score=0.5, rejected_score=0.25)


@pytest.mark.parametrize(
    ("candidates", "total", "reason"),
    [
        ((), (), NoPairReason.TOO_FEW_CANDIDATES),
        ((ORIGINAL,), (1.0,), NoPairReason.TOO_FEW_CANDIDATES),
        (FOUR, (GONE, 1.0, GONE, GONE), NoPairReason.TOO_FEW_CANDIDATES),
        (FOUR, (GONE, GONE, GONE, GONE), NoPairReason.TOO_FEW_CANDIDATES),
        (FOUR, (0.5, 0.5, GONE, 0.5), NoPairReason.TIE),
        (FOUR[:2], (0.1 + 0.2, 0.3), NoPairReason.TIE),
        ((rollout(0, 5), rollout(1, 5)), (GONE, GONE), NoPairReason.IDENTICAL_TOKENS),
        ((rollout(0, 5), rollout(1, 5), ORIGINAL), (0.5, 0.5, GONE), NoPairReason.IDENTICAL_TOKENS),
    ],
)
@pytest.mark.parametrize("select", [select_pair, best_only])
def test_what_trains_nothing(select, candidates, total, reason) -> None:
    assert select(pool(*candidates), scores(*total), seed=1) == NoPair(reason)


def test_differences_above_the_tolerance_make_a_pair() -> None:
    assert isinstance(select_pair(pool(*FOUR[:2]), scores(0.3 + 2e-9, 0.3), seed=1), Pair)
    assert select_pair(pool(*FOUR[:2]), scores(0.3 + 2e-9, 0.3), seed=1, tolerance=1e-8) == NoPair(NoPairReason.TIE)


def test_copies_that_only_a_bonus_parts_are_no_pair() -> None:
    copies = pool(Candidate(CandidateKind.ORIGINAL, (5,), "five"), rollout(0, 5), rollout(1, 6))
    assert select_pair(copies, scores(0.75, 0.25, 0.5), seed=1) == NoPair(NoPairReason.IDENTICAL_TOKENS)


def test_ties_at_both_ends_are_drawn_evenly_independently_and_repeatably() -> None:
    candidates = (*FOUR, rollout(3, 8))
    total = scores(1.0, 0.0, 1.0 - 1e-12, 0.0, 1.0)

    def drawn(seed: int) -> list[tuple[str, str]]:
        picked = []
        for sample in range(3000):
            pair = select_pair(pool(*candidates, sample_index=sample), total, seed=seed)
            assert isinstance(pair, Pair)
            assert pair.rejected is not None
            picked.append((pair.chosen.text, pair.rejected.text))
        return picked

    first = drawn(1)
    counts = Counter(first)
    assert len(counts) == 6
    # Six cells of 500 each; chi-square with 5 degrees of freedom exceeds 20.5 once in a thousand times.
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 20.5
    assert drawn(1) == first
    assert drawn(2) != first


def test_best_only_takes_the_best_and_rejects_nothing() -> None:
    assert best_only(pool(*FOUR), scores(0.5, 0.25, GONE, 0.75), seed=1) == Pair(FOUR[3], None, chosen_score=0.75)


def test_scores_of_another_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="2 scores for 4 candidates"):
        select_pair(pool(*FOUR), scores(1.0, 0.0), seed=1)


FULL = pool(ORIGINAL, rollout(1, 6), REWRITE, rollout(0, 5))


@pytest.mark.parametrize(
    ("objective", "of", "expected"),
    [
        ("sft-rewrite", FULL, Pair(REWRITE, None)),
        ("sft-rewrite", pool(ORIGINAL, rollout(0, 5)), NoPair(NoPairReason.MISSING_REWRITE)),
        ("sft-rollout", FULL, Pair(rollout(0, 5), None)),
        ("sft-rollout", pool(ORIGINAL, rollout(3, 5)), Pair(rollout(3, 5), None)),
        ("sft-rollout", pool(ORIGINAL, REWRITE), NoPair(NoPairReason.MISSING_ROLLOUT)),
        ("dpo-rewrite-over-rollout", FULL, Pair(REWRITE, rollout(0, 5))),
        ("dpo-rewrite-over-rollout", pool(rollout(0, 5)), NoPair(NoPairReason.MISSING_REWRITE)),
        ("dpo-rewrite-over-rollout", pool(REWRITE), NoPair(NoPairReason.MISSING_ROLLOUT)),
        ("dpo-rewrite-over-rollout", pool(REWRITE, rollout(0, 3, 4)), NoPair(NoPairReason.IDENTICAL_TOKENS)),
    ],
)
def test_objectives_without_a_judge(objective: Objective, of: Pool, expected: Pair | NoPair) -> None:
    assert not needs_scores(objective)
    assert choose(objective, of, None, seed=1) == expected


def test_objectives_with_a_judge() -> None:
    total = scores(0.5, 0.25, 1.0, 0.0)
    assert choose("online-dpo", FULL, total, seed=1) == Pair(REWRITE, rollout(0, 5), 1.0, 0.0)
    assert choose("rf-nll", FULL, total, seed=1) == Pair(REWRITE, None, 1.0)


@pytest.mark.parametrize(
    ("objective", "message"), [("online-dpo", "by score"), ("rf-nll", "by score"), ("ntp", "makes no pairs")]
)
def test_objectives_that_cannot_choose_here(objective: Objective, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(objective, FULL, None, seed=1)
