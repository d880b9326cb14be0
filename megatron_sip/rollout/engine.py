"""What a rollout engine is: prefixes in, K continuations a prefix out, in tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

from megatron_sip.cost.done import DoneWork
from megatron_sip.types import TokenArray

OnWave: TypeAlias = Callable[[int, "Rollouts"], None]
"""Hears that the prefixes from this place on have these rollouts."""


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn. `temperature = 0` is greedy; `stop_at_eod = False` never samples EOD."""

    num_rollouts: int
    max_new_tokens: int
    temperature: float
    top_p: float
    eod: int
    stop_at_eod: bool
    seed: int


@dataclass(frozen=True)
class Rollouts:
    """The continuations of a batch of prefixes.

    tokens   [prefixes, num_rollouts, max_new_tokens] int64 on the host; 0 behind a row's length
    lengths  [prefixes, num_rollouts] int64; the EOD that ends a row counts
    metrics  what the engine measured, as (sum, count) by a name of `metrics/names.py`
    work     what the policy's own ranks computed for it, those of one model-parallel group together
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    work: DoneWork = DoneWork()  # noqa: RUF009  # it is frozen

    def row(self, prefix: int, rollout: int) -> tuple[int, ...]:
        """The tokens of one continuation."""
        return tuple(self.tokens[prefix, rollout, : int(self.lengths[prefix, rollout])].tolist())


class RolloutEngine(Protocol):
    """Writes continuations with the policy's current weights."""

    def generate(
        self,
        prefixes: Sequence[TokenArray],
        sample_indices: Sequence[int],
        sampling: Sampling,
        on_wave: OnWave = lambda _first, _rollouts: None,
    ) -> Rollouts:
        """Continue each prefix `sampling.num_rollouts` times.

        Called by all ranks of a model-parallel group with the same arguments; all get the same result. `on_wave` hears
        of each prefix once, in any order: on the leader as soon as all its rollouts are there, while those of others
        may still be written, and perhaps from another thread, one call at a time; elsewhere before this returns.
        The randomness of a row depends on (seed, sample index, rollout, position) alone.
        """
        ...

    def close(self) -> None:
        """Leave nothing running and nothing behind."""
        ...
