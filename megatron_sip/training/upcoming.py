"""The cuts of the iterations to come, whose rewrites are fetched while the trainer is busy with earlier ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megatron_sip.config.groups import Config
from megatron_sip.services.build import needs_rewriter
from megatron_sip.training.preferences import BatchMaker
from megatron_sip.types import Cut


class Upcoming:
    """Reads cuts in the order of training, each batch once, and holds those of at most `--rewrite-ahead` iterations.

    So much of text and so many rewrites are in memory, and the trainer waits for a rewriter only when that is behind
    by all of them. `cuts(consumed)` gives this rank's share of the global batch behind so many consumed samples. Every
    rank makes the same calls.
    """

    def __init__(self, config: Config, maker: BatchMaker, cuts: Callable[[int], list[Cut]]) -> None:
        self._size = config.training.global_batch_size
        self._end = config.training.train_iters
        self._ahead = config.rewriter.rewrite_ahead if needs_rewriter(config) else 1
        self._maker = maker
        self._cuts = cuts
        self._batches: deque[list[Cut]] = deque()

    def take(self, consumed: int) -> list[Cut]:
        """The cuts of the iteration behind `consumed` samples, which is the next that is begun."""
        return self._batches.popleft() if self._batches else self._cuts(consumed)

    def read_on(self, iteration: int, consumed: int) -> None:
        """Read the cuts of `iteration`, which is behind `consumed` samples, and of those after it; ask for rewrites.

        None are read beyond `--train-iters`.
        """
        while len(self._batches) < self._ahead and iteration + len(self._batches) < self._end:
            ahead = len(self._batches)
            batch = self._cuts(consumed + ahead * self._size)
            self._batches.append(batch)
            self._maker.prefetch(batch, iteration + ahead)

    def forget(self) -> None:
        """The run goes back: other cuts come now."""
        self._maker.forget()
        self._batches.clear()
