"""Which batches are begun before which is trained: judges work on one while the policy trains the one before.

    lag 0   rollouts 0 | verdicts 0 | update 0 | rollouts 1 | verdicts 1 | update 1 | ...
    lag 1   rollouts 0, 1 | update 0 | rollouts 2 | update 1 | rollouts 3 | update 2 | ...
                       verdicts 0, then 1 meanwhile, then 2 meanwhile

A batch is begun when its rollouts are written and its questions are on their way, and finished when its pairs are
known. With lag 1 the verdicts of a batch may so take as long as an update and the rollouts of the next batch before
anybody waits for them, and the rollouts of a batch are by the weights before the last update.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from megatron_sip.config.groups import Config
from megatron_sip.preference.select import needs_scores


class Begun(Protocol):
    """A batch that was begun."""

    def cancel(self) -> None:
        """Give up what is under way for it."""
        ...


B = TypeVar("B", bound=Begun)


def lag_of(config: Config) -> int:
    """By how many batches judging may lag behind: `--judge-lag`, and 0 for objectives that ask no judge."""
    return config.judge.judge_lag if needs_scores(config.training.objective) else 0


class Overlap(Generic[B]):
    """The batches that were begun and not yet trained, by their iteration; at most `lag` + 1, none from `end` on.

    Every rank makes the same calls.
    """

    def __init__(self, lag: int, end: int) -> None:
        self._lag, self._end = lag, end
        self._begun: dict[int, B] = {}

    @property
    def ahead(self) -> int:
        """How many batches wait to be trained."""
        return len(self._begun)

    def due(self, iteration: int) -> list[int]:
        """The iterations whose batches are to be begun now, in this order, before `iteration` is trained."""
        ahead = range(iteration, min(iteration + self._lag + 1, self._end))
        return [place for place in ahead if place not in self._begun]

    def add(self, iteration: int, batch: B) -> None:
        """The batch of `iteration` was begun."""
        self._begun[iteration] = batch

    def take(self, iteration: int) -> B:
        """The batch that is trained now. KeyError if it was not begun."""
        return self._begun.pop(iteration)

    def waiting(self, iteration: int) -> B | None:
        """The batch of `iteration` if it was begun and is not trained yet."""
        return self._begun.get(iteration)

    def forget(self) -> None:
        """Give up all that was begun: the run goes back, and other batches come now."""
        for batch in self._begun.values():
            batch.cancel()
        self._begun.clear()
