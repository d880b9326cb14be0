"""Rounds of questions put to a function, in place of `services.rounds` and its servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_sip.services.rounds import Rounds
from megatron_sip.types import Answers, Pool, Question

T = TypeVar("T")


def ask_rounds(
    rounds: Rounds[T], answer: Callable[[Sequence[Pool], Sequence[Sequence[Question]]], Sequence[Answers]]
) -> T:
    """The result of rounds that `answer(pools, questions)` answers."""
    answers: list[Answers] = [{} for _ in rounds.pools]
    while any(questions := rounds.next(answers)):
        for given, fresh in zip(answers, answer(rounds.pools, questions), strict=True):
            given.update(fresh)
    return rounds.result(answers)
