"""What a judge said of one labelled record, and whether it is right. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sip.preference.combine import TOLERANCE
from megatron_sip.types import Missing, Verdict


@dataclass(frozen=True)
class Observation:
    """One record under one reading.

    `correct` is 1 where the judge sides with the label, 0 where against it, one half where with neither, and None
    without any verdict. `first_option` is the mean belief in the option shown first, `consistent` whether both orders
    have the same winner (or none); both are None unless both orders were answered. `score` is that of a labelled
    text, `right` its label; `asked` counts questions, `missing` holds a reason for each that was not answered.
    """

    correct: float | None
    asked: int
    missing: tuple[str, ...] = ()
    first_option: float | None = None
    consistent: bool | None = None
    score: float | None = None
    right: bool | None = None

    @property
    def answered(self) -> bool:
        """Whether there was any verdict."""
        return self.correct is not None


def observe_orders(good_first: Sequence[Verdict], bad_first: Sequence[Verdict]) -> Observation:
    """A pairwise judge on one pair: its beliefs in option 1, by the order shown; an order not asked is empty.

    The belief in the good one is the mean over all answered questions, as in training.
    """
    straight, turned = present(good_first), [1.0 - belief for belief in present(bad_first)]
    belief = _mean([*straight, *turned])
    both = bool(straight) and bool(turned)
    return Observation(
        correct=side(belief),
        asked=len(good_first) + len(bad_first),
        missing=reasons([*good_first, *bad_first]),
        first_option=(_mean_of(straight) + 1.0 - _mean_of(turned)) / 2 if both else None,
        consistent=side(_mean_of(straight)) == side(_mean_of(turned)) if both else None,
    )


def observe_ranking(good: Sequence[Verdict], bad: Sequence[Verdict]) -> Observation:
    """A pointwise judge on one pair: the good one should have the higher score, whatever the scale."""
    better, worse = _mean(present(good)), _mean(present(bad))
    gap = None if better is None or worse is None else better - worse
    return Observation(
        correct=None if gap is None else side(0.5 + gap), asked=len(good) + len(bad), missing=reasons([*good, *bad])
    )


def observe_text(verdicts: Sequence[Verdict], right: bool) -> Observation:
    """A pointwise judge on one labelled text: a score above one half says that all is right with it."""
    score = _mean(present(verdicts))
    verdict = side(score)
    return Observation(
        correct=verdict if verdict is None or right else 1.0 - verdict,
        asked=len(verdicts),
        missing=reasons(verdicts),
        score=score,
        right=right,
    )


def side(value: float | None) -> float | None:
    """1 above one half, 0 below, one half on it (within the tolerance that scores are compared with)."""
    if value is None or abs(value - 0.5) <= TOLERANCE:
        return value if value is None else 0.5
    return float(value > 0.5)


def present(verdicts: Sequence[Verdict]) -> list[float]:
    """The verdicts that are there. ValueError for one outside [0, 1], which no judge may give."""
    there = [verdict for verdict in verdicts if not isinstance(verdict, Missing)]
    for verdict in there:
        if not 0.0 <= verdict <= 1.0:  # NaN fails this, too
            raise ValueError(f"the verdict {verdict} is not in [0, 1]")
    return there


def reasons(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    """Why the others are not."""
    return tuple(verdict.reason.value for verdict in verdicts if isinstance(verdict, Missing))


def _mean(values: Sequence[float]) -> float | None:
    return _mean_of(values) if values else None


def _mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)
