"""The rows of a wave in groups of whole prefixes, each with its cache, which pass the pipeline stages in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch

from megatron_sip.rollout.cache import DecodeCache, PrefillCache, StaticDecodeCache
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.graphs import GraphedStage
from megatron_sip.rollout.sampling import uniforms
from megatron_sip.types import TokenArray


def divide(prefixes: int, groups: int) -> list[slice]:
    """At most `groups` runs of whole prefixes, as equal as they can be and none empty."""
    count = min(prefixes, groups)
    ends = [prefixes * group // count for group in range(count + 1)]
    return [slice(first, stop) for first, stop in pairwise(ends)]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return -(-value // multiple) * multiple


class RowGroup:
    """Some prefixes and the rows that continue them, as one stage sees them.

    tokens   [rows, max_new_tokens] int64, a view of the wave's; on the first and last stage filled token by token
    draws    [rows, max_new_tokens] float64 in [0, 1)
    stage    runs this stage's layers for a token of every row, as the policy would
    cache    of the prefixes until they are prefilled, then of the rows
    """

    def __init__(
        self,
        prefixes: Sequence[TokenArray],
        sample_indices: Sequence[int],
        sampling: Sampling,
        tokens: torch.Tensor,
        stage: Callable[..., torch.Tensor],
    ) -> None:
        self.prefixes = prefixes
        self.stage = stage
        self.sampling = sampling
        self.tokens = tokens
        k, count = sampling.num_rollouts, sampling.max_new_tokens
        numbers = [uniforms(sampling.seed, index, rollout, count) for index in sample_indices for rollout in range(k)]
        self.draws = torch.from_numpy(np.stack(numbers)).to(tokens.device)
        self.lengths = torch.tensor([len(prefix) for prefix in prefixes])
        zeros = torch.zeros_like(self.lengths)
        self.cache: PrefillCache | DecodeCache = PrefillCache(torch.stack([self.lengths, zeros, zeros], dim=1))
        self.positions = self.lengths.repeat_interleave(k).to(tokens.device)

    @property
    def rows(self) -> int:
        """Prefixes times rollouts."""
        return len(self.tokens)

    def decoding(self) -> DecodeCache:
        """The cache of the rows, made of that of the prefixes at the first call."""
        if isinstance(self.cache, PrefillCache):
            kind = StaticDecodeCache if isinstance(self.stage, GraphedStage) else DecodeCache
            self.cache = kind(self.cache, self.sampling.num_rollouts, self.sampling.max_new_tokens)
        return self.cache

    def shape(self, step: int, multiple: int) -> tuple[int, int]:
        """(positions, batch) of the pass that gives token `step`, positions padded to a multiple.

        The prefixes stand side by side; of a step of decoding the rows stand along the sequence.
        """
        if step == 0:
            return round_up(int(self.lengths.max()), multiple), len(self.prefixes)
        return round_up(self.rows, multiple), 1

    def padding(self, multiple: int) -> tuple[int, int]:
        """Positions without a token, and all positions, of the pass over the prefixes."""
        width, batch = self.shape(0, multiple)
        return width * batch - int(self.lengths.sum()), width * batch

    def ended(self, count: int) -> bool:
        """Whether every row has drawn its EOD among its first `count` tokens."""
        if not self.sampling.stop_at_eod or count == 0:
            return False
        return bool((self.tokens[:, :count] == self.sampling.eod).any(dim=1).all())
