"""The optional curriculum: rollouts come in late, original and rewrite get a bonus that decays (method section 5)."""

from __future__ import annotations

from dataclasses import replace

from megatron_sip.config.groups import PreferenceConfig, RolloutConfig
from megatron_sip.types import CandidateKind, Missing, Pool, Scores, Verdict


def active_rollouts(cfg: PreferenceConfig, rollout_cfg: RolloutConfig, iteration: int) -> int:
    """Rollouts per prefix at `iteration` (counted from 0).

    Under the schedule: none before `curriculum_rollout_start`, then 1 growing evenly to the full number,
    which is reached `curriculum_rollout_ramp` iterations later.
    """
    full = rollout_cfg.num_rollouts
    if cfg.curriculum == "none":
        return full
    elapsed = iteration - cfg.curriculum_rollout_start
    if elapsed < 0:
        return 0
    if elapsed >= cfg.curriculum_rollout_ramp:
        return full
    return 1 + (full - 1) * elapsed // cfg.curriculum_rollout_ramp


def score_bonus(cfg: PreferenceConfig, kind: CandidateKind, iteration: int) -> float:
    """What the schedule adds to the total score of an original or a rewrite at `iteration`; it falls evenly to 0."""
    if cfg.curriculum == "none" or kind is CandidateKind.ROLLOUT or iteration >= cfg.curriculum_bonus_iters:
        return 0.0
    return cfg.curriculum_bonus * (1.0 - iteration / cfg.curriculum_bonus_iters)


def apply_bonus(scores: Scores, pool: Pool, cfg: PreferenceConfig, iteration: int) -> Scores:
    """Scores of the pool with the bonus in the totals; the judges' own parts and missing totals stay as they are."""

    def with_bonus(total: Verdict, kind: CandidateKind) -> Verdict:
        return total if isinstance(total, Missing) else total + score_bonus(cfg, kind, iteration)

    pairs = zip(scores.total, pool.candidates, strict=True)
    return replace(scores, total=tuple(with_bonus(total, candidate.kind) for total, candidate in pairs))
