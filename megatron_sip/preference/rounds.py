"""The next round of a whole batch of scoring plans, with what can be worked out together worked out together."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_sip.preference.adaptive import AdaptivePlan, plan_together
from megatron_sip.preference.scoring import ScoringPlan
from megatron_sip.preference.screen import ScreenedPlan, moved
from megatron_sip.types import Answers, Question


def next_rounds(plans: Sequence[ScoringPlan], answers: Sequence[Answers]) -> list[list[Question]]:
    """The next round of every plan of a batch: like asking each, but adaptive plans are fitted at once.

    So are those behind a screen, among the candidates that it left.
    """
    questions: list[list[Question]] = []
    adaptive: dict[int, tuple[AdaptivePlan, Answers, tuple[int, ...] | None]] = {}
    for index, (plan, given) in enumerate(zip(plans, answers, strict=True)):
        questions.append([])
        behind = plan.behind(given) if isinstance(plan, ScreenedPlan) else None
        if isinstance(plan, AdaptivePlan):
            adaptive[index] = (plan, given, None)
        elif behind is not None and isinstance(behind.plan, AdaptivePlan):
            adaptive[index] = (behind.plan, behind.answers, behind.members)
        else:
            questions[index] = plan.next_round(given)
    together = plan_together([plan for plan, _, _ in adaptive.values()], [known for _, known, _ in adaptive.values()])
    for (index, (_, _, members)), own in zip(adaptive.items(), together, strict=True):
        questions[index] = own if members is None else moved(own, members)
    return questions
