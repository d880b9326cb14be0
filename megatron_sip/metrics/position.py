"""How much a pairwise judge minds which option it sees first, from the verdicts of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_sip.preference.fitted import position_bias
from megatron_sip.preference.spec import JudgeSpec
from megatron_sip.types import Answers, Missing

SumCount = tuple[float, float]
BIAS, CONSISTENCY = "judge/position_bias", "judge/order_consistency"
FITTED_BIAS = "judge/position_bias_logits"
SAME_BELIEF = 1e-9


def position_names(judge: str) -> tuple[str, str]:
    """The metrics of one judge."""
    return f"{BIAS}/{judge}", f"{CONSISTENCY}/{judge}"


def position_metrics(answers: Sequence[Answers]) -> dict[str, SumCount]:
    """(sum, count) of position bias and order consistency, over all pairwise judges and of each.

    Bias: the belief that the option shown first wins, less one half. Its expectation is 0 for a judge without bias,
    where pairs are asked in both orders or in one that was drawn. Consistency: of the pairs answered in both orders,
    the share whose winner (or tie) is the same in both; votes in one order are averaged.
    """
    values: dict[str, SumCount] = {BIAS: (0.0, 0.0), CONSISTENCY: (0.0, 0.0)}

    def add(name: str, judge: str, value: float) -> None:
        for key in (name, f"{name}/{judge}"):
            total, count = values.get(key, (0.0, 0.0))
            values[key] = (total + value, count + 1.0)

    for of_pool in answers:
        beliefs: dict[tuple[str, int, int], list[float]] = {}
        for question, verdict in of_pool.items():
            if question.second is not None and not isinstance(verdict, Missing):
                add(BIAS, question.judge, verdict - 0.5)
                beliefs.setdefault((question.judge, question.first, question.second), []).append(verdict)
        for judge, same in _both_orders(beliefs):
            add(CONSISTENCY, judge, float(same))
    return values


def fitted_bias(sizes: Sequence[int], answers: Sequence[Answers], judges: Sequence[JudgeSpec]) -> dict[str, SumCount]:
    """(sum, count) of the fitted liking for the first option in logits, over all pairwise judges.

    For plans that choose the option order by what they still want to know, where a mean of beliefs would tell which
    candidates stood first. `sizes[i]` counts the distinct candidates of the pool that `answers[i]` speak of.
    """
    found = [position_bias(sizes, answers, judge) for judge in judges if judge.pairwise and judge.weight > 0]
    return {FITTED_BIAS: (sum(total for total, _ in found), sum(count for _, count in found))}


def _both_orders(beliefs: dict[tuple[str, int, int], list[float]]) -> Iterator[tuple[str, bool]]:
    """Of each pair that has both orders, its judge and whether they agree."""
    for (judge, first, second), ahead in beliefs.items():
        behind = beliefs.get((judge, second, first))
        if first < second and behind is not None:
            yield judge, _winner(ahead) == -_winner(behind)


def _winner(beliefs: list[float]) -> int:
    """1 where the first option wins, -1 where the second does, 0 for a tie."""
    lead = sum(beliefs) / len(beliefs) - 0.5
    return 0 if abs(lead) <= SAME_BELIEF else (1 if lead > 0 else -1)
