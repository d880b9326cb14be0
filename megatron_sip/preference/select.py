"""Scores to a pair, or none and why (paper sections 5 and 6; ties and empty pools: method section 5)."""

from __future__ import annotations

from megatron_sip.config.groups import Objective
from megatron_sip.preference.combine import TOLERANCE
from megatron_sip.preference.draw import Purpose, draw_index
from megatron_sip.types import Candidate, CandidateKind, Missing, NoPair, NoPairReason, Pair, Pool, Scores


def _extremes(pool: Pool, scores: Scores, seed: int, tolerance: float) -> tuple[int, int] | NoPair:
    """Pool indices of best and worst; ties at either end are broken by a seeded draw over the candidates there."""
    if len(scores.total) != len(pool.candidates):
        raise ValueError(
            f"{len(scores.total)} scores for {len(pool.candidates)} candidates: "
            "spread the scores of distinct candidates over the pool first"
        )
    if len(pool.candidates) < 2:
        return NoPair(NoPairReason.TOO_FEW_CANDIDATES)
    if len({candidate.tokens for candidate in pool.candidates}) < 2:
        return NoPair(NoPairReason.IDENTICAL_TOKENS)
    scored = {index: score for index, score in enumerate(scores.total) if not isinstance(score, Missing)}
    if len(scored) < 2:
        return NoPair(NoPairReason.TOO_FEW_CANDIDATES)
    if len({pool.candidates[index].tokens for index in scored}) < 2:
        return NoPair(NoPairReason.IDENTICAL_TOKENS)
    highest, lowest = max(scored.values()), min(scored.values())
    if highest - lowest <= tolerance:
        return NoPair(NoPairReason.TIE)
    best = [index for index, score in scored.items() if highest - score <= tolerance]
    worst = [index for index, score in scored.items() if score - lowest <= tolerance]
    return (
        best[draw_index(len(best), seed, Purpose.BEST_TIE, pool.sample_index)],
        worst[draw_index(len(worst), seed, Purpose.WORST_TIE, pool.sample_index)],
    )


def _score(scores: Scores, index: int) -> float:
    score = scores.total[index]
    if isinstance(score, Missing):
        raise ValueError(f"candidate {index} has no score: {score}")
    return score


def select_pair(pool: Pool, scores: Scores, *, seed: int, tolerance: float = TOLERANCE) -> Pair | NoPair:
    """Best over worst of the pool, for online DPO (paper section 5).

    `scores` are indexed like `pool.candidates`. Nothing is trained when fewer than two candidates have a
    score, when best and worst are equal within `tolerance`, or when they are the same tokens (copies
    share a score, so only a score bonus can part them).
    """
    extremes = _extremes(pool, scores, seed, tolerance)
    if isinstance(extremes, NoPair):
        return extremes
    best, worst = extremes
    chosen, rejected = pool.candidates[best], pool.candidates[worst]
    if chosen.tokens == rejected.tokens:
        return NoPair(NoPairReason.IDENTICAL_TOKENS)
    return Pair(chosen, rejected, chosen_score=_score(scores, best), rejected_score=_score(scores, worst))


def best_only(pool: Pool, scores: Scores, *, seed: int, tolerance: float = TOLERANCE) -> Pair | NoPair:
    """The best of the pool alone, for RF-NLL (paper section 5), under the same rules for what trains nothing."""
    extremes = _extremes(pool, scores, seed, tolerance)
    if isinstance(extremes, NoPair):
        return extremes
    best = extremes[0]
    return Pair(pool.candidates[best], None, chosen_score=_score(scores, best))


def _first_of(pool: Pool, kind: CandidateKind) -> Candidate | None:
    """The candidate of a kind with the lowest rollout index, or None."""
    matching = [candidate for candidate in pool.candidates if candidate.kind is kind]
    return min(matching, key=lambda candidate: candidate.rollout_index or 0, default=None)


def rewrite_alone(pool: Pool) -> Pair | NoPair:
    """SFT on the rewrite (paper section 6)."""
    rewrite = _first_of(pool, CandidateKind.REWRITE)
    return NoPair(NoPairReason.MISSING_REWRITE) if rewrite is None else Pair(rewrite, None)


def rollout_alone(pool: Pool) -> Pair | NoPair:
    """SFT on one rollout (paper section 6): the first that is there."""
    rollout = _first_of(pool, CandidateKind.ROLLOUT)
    return NoPair(NoPairReason.MISSING_ROLLOUT) if rollout is None else Pair(rollout, None)


def rewrite_over_rollout(pool: Pool) -> Pair | NoPair:
    """DPO of the rewrite over the first rollout, without a judge (paper section 6)."""
    rewrite, rollout = _first_of(pool, CandidateKind.REWRITE), _first_of(pool, CandidateKind.ROLLOUT)
    if rewrite is None:
        return NoPair(NoPairReason.MISSING_REWRITE)
    if rollout is None:
        return NoPair(NoPairReason.MISSING_ROLLOUT)
    if rewrite.tokens == rollout.tokens:
        return NoPair(NoPairReason.IDENTICAL_TOKENS)
    return Pair(rewrite, rollout)


def needs_scores(objective: Objective) -> bool:
    """Whether `choose` wants scores for this objective, that is, whether a judge is asked at all."""
    return objective in ("online-dpo", "rf-nll")


def choose(objective: Objective, pool: Pool, scores: Scores | None, seed: int) -> Pair | NoPair:
    """What the objective trains on for this cut.

    Raises:
        ValueError: an objective that compares scores was given none, or `ntp`, which makes no pairs.
    """
    if needs_scores(objective):
        if scores is None:
            raise ValueError(f"objective {objective} selects by score, but no scores were given")
        select = select_pair if objective == "online-dpo" else best_only
        return select(pool, scores, seed=seed)
    if objective == "sft-rewrite":
        return rewrite_alone(pool)
    if objective == "sft-rollout":
        return rollout_alone(pool)
    if objective == "dpo-rewrite-over-rollout":
        return rewrite_over_rollout(pool)
    raise ValueError(f"objective {objective} makes no pairs")
