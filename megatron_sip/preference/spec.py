"""What a scoring plan and the scores need to know of a judge."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.groups import PreferenceConfig
from megatron_sip.preference.bradley_terry import AnswerKind


@dataclass(frozen=True)
class JudgeSpec:
    """What a plan needs to know of a judge.

    `weight` is its share in the sum of scores; a judge with weight 0 is not asked. `votes` counts the
    times each question is asked. `both_orders` asks a pairwise question with either candidate first.
    `tells_safety` marks a pointwise judge whose score a screen may go by.

    The adaptive plan reads two more of a pairwise judge, and neither `votes` nor `both_orders`. `answers` says
    whether a verdict is one vote or a probability; `repeats` how often the same question in the same option order
    is worth an answer: 1 for a judge that would say the same again (temperature 0, or a probability).
    """

    name: str
    pairwise: bool
    weight: float
    votes: int = 1
    both_orders: bool = False
    tells_safety: bool = False
    answers: AnswerKind = "votes"
    repeats: int = PreferenceConfig.adaptive_repeats

    def __post_init__(self) -> None:
        if self.votes < 1:
            raise ValueError(f"judge {self.name}: votes must be at least 1, not {self.votes}")
        if self.weight < 0:
            raise ValueError(f"judge {self.name}: weight must not be negative, not {self.weight}")
        if self.repeats < 1:
            raise ValueError(f"judge {self.name}: repeats must be at least 1, not {self.repeats}")
