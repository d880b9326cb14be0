"""The rollouts of a batch that is yet to be trained, kept because the weights that wrote them are gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sip.rollout.engine import Rollouts


@dataclass(frozen=True, eq=False)
class PendingBatch:
    """Rollouts by the global sample index of their prefix.

    `samples[i]` is the sample of prefix i of `rollouts`. A rank holds its own share of the batch, or more of it; a
    checkpoint holds the whole. What the engine measured is left behind: the step that wrote them reports it.
    """

    samples: tuple[int, ...]
    rollouts: Rollouts

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.rollouts.tokens) or len(set(self.samples)) != len(self.samples):
            raise ValueError(f"rollouts of {len(self.rollouts.tokens)} prefixes for the samples {self.samples}")

    def holds(self, samples: Sequence[int]) -> bool:
        """Whether the rollouts of all these samples are there."""
        return set(samples) <= set(self.samples)

    def of(self, samples: Sequence[int]) -> Rollouts:
        """The rollouts of these samples in this order. KeyError for a sample that is not there."""
        place = {sample: index for index, sample in enumerate(self.samples)}
        rows = torch.tensor([place[sample] for sample in samples], dtype=torch.int64)
        return Rollouts(self.rollouts.tokens[rows], self.rollouts.lengths[rows])


def joined(parts: Sequence[PendingBatch]) -> PendingBatch:
    """All that the parts hold, in the order of the samples; what several hold is the same in each."""
    found = {
        sample: (part.rollouts.tokens[row], part.rollouts.lengths[row])
        for part in parts
        for row, sample in enumerate(part.samples)
    }
    samples = tuple(sorted(found))
    tokens, lengths = (torch.stack([found[sample][part] for sample in samples]) for part in range(2))
    return PendingBatch(samples, Rollouts(tokens, lengths))
