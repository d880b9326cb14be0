"""Log-probabilities summed over the segments of preference rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_sip.preference.layout import CHOSEN, PREFIX, REJECTED, ScoredTokens


@dataclass(frozen=True)
class SegmentLogps:
    """The policy's summed log-probabilities, each `[rows]`; a segment that a row lacks has sum 0."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    prefix: torch.Tensor


def of_pairs(sums: SegmentLogps) -> SegmentLogps:
    """Sums `[2 * rows]` of two rows a pair (`preference.unshared.two_rows`) as sums `[rows]` of the pairs."""
    return SegmentLogps(chosen=sums.chosen[0::2], rejected=sums.chosen[1::2], prefix=sums.prefix[0::2])


@dataclass(frozen=True)
class ReferenceLogps:
    """The reference's summed log-probabilities, each `[rows]`, without gradient."""

    chosen: torch.Tensor
    rejected: torch.Tensor

    def take(self, rows: Sequence[int]) -> ReferenceLogps:
        """Those of these rows, in this order (a micro-batch)."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.chosen.device)
        return ReferenceLogps(self.chosen[index], self.rejected[index])


def segment_sums(token_logps: torch.Tensor, scored: ScoredTokens, rows: int) -> SegmentLogps:
    """Sum token log-probabilities `[n]`, in the order of `scored`, per row and segment, in float64.

    Float64, because DPO takes differences of sums over a hundred tokens and more.
    """
    sums = torch.zeros(rows * 3, dtype=torch.float64, device=token_logps.device)
    sums = sums.index_add(0, scored.row * 3 + scored.segment, token_logps.to(torch.float64))
    by_segment = sums.view(rows, 3)
    return SegmentLogps(chosen=by_segment[:, CHOSEN], rejected=by_segment[:, REJECTED], prefix=by_segment[:, PREFIX])
