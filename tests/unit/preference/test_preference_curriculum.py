"""The schedule of rollouts and of the score bonus."""

from __future__ import annotations

import pytest

from megatron_sip.config.groups import PreferenceConfig, RolloutConfig
from megatron_sip.preference.curriculum import active_rollouts, apply_bonus, score_bonus
from megatron_sip.types import Candidate, CandidateKind, Missing, MissingReason, Pool, Scores

EIGHT = RolloutConfig(num_rollouts=8)


def schedule(start: int = 0, ramp: int = 0, bonus: float = 0.0, bonus_iters: int = 0) -> PreferenceConfig:
    return PreferenceConfig(
        curriculum="schedule",
        curriculum_rollout_start=start,
        curriculum_rollout_ramp=ramp,
        curriculum_bonus=bonus,
        curriculum_bonus_iters=bonus_iters,
    )


def test_without_a_schedule_nothing_changes_over_time() -> None:
    plain = PreferenceConfig(curriculum_rollout_start=5, curriculum_bonus=1.0, curriculum_bonus_iters=10)
    assert [active_rollouts(plain, EIGHT, iteration) for iteration in (0, 5, 100)] == [8, 8, 8]
    assert score_bonus(plain, CandidateKind.ORIGINAL, 0) == 0.0


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        # Off for three iterations, then 1 + floor(7 t / 4) for t = 0..3, then all.
        (schedule(start=3, ramp=4), [0, 0, 0, 1, 2, 4, 6, 8, 8]),
        (schedule(start=2), [0, 0, 8, 8, 8, 8, 8, 8, 8]),
        (schedule(ramp=7), [1, 2, 3, 4, 5, 6, 7, 8, 8]),
        (schedule(), [8] * 9),
    ],
)
def test_rollouts_start_late_and_ramp_up(cfg: PreferenceConfig, expected: list[int]) -> None:
    assert [active_rollouts(cfg, EIGHT, iteration) for iteration in range(9)] == expected


def test_one_rollout_has_nothing_to_ramp() -> None:
    one = RolloutConfig(num_rollouts=1)
    assert [active_rollouts(schedule(start=1, ramp=3), one, iteration) for iteration in range(5)] == [0, 1, 1, 1, 1]


def test_bonus_decays_evenly_and_never_helps_rollouts() -> None:
    cfg = schedule(bonus=2.0, bonus_iters=4)
    for kind in (CandidateKind.ORIGINAL, CandidateKind.REWRITE):
        assert [score_bonus(cfg, kind, iteration) for iteration in range(6)] == [2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert [score_bonus(cfg, CandidateKind.ROLLOUT, iteration) for iteration in range(6)] == [0.0] * 6
    assert score_bonus(schedule(bonus=2.0), CandidateKind.ORIGINAL, 0) == 0.0


def test_bonus_moves_totals_only_and_leaves_missing_missing() -> None:
    gone = Missing(MissingReason.TOO_FEW_ANSWERS)
    kinds = (CandidateKind.ORIGINAL, CandidateKind.REWRITE, CandidateKind.ROLLOUT)
    pool = Pool(0, "", "", tuple(Candidate(kind, (index,), "") for index, kind in enumerate(kinds)))
    before = Scores((0.25, gone, 0.5), {"quality": (0.25, gone, 0.5)}, 3, {"timeout": 1})
    after = apply_bonus(before, pool, schedule(bonus=1.0, bonus_iters=2), iteration=1)
    assert after == Scores((0.75, gone, 0.5), {"quality": (0.25, gone, 0.5)}, 3, {"timeout": 1})
    with pytest.raises(ValueError, match="longer"):
        apply_bonus(Scores((0.5,), {}), pool, schedule(bonus=1.0, bonus_iters=2), iteration=0)
