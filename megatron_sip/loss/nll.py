"""Negative log-likelihood, the loss of RF-NLL, of SFT and of next-token prediction."""

from __future__ import annotations

import torch


def token_nll_sum(logps: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Scalar sum over rows of `-logps * weight`.

    logps   [rows] log-probabilities summed over the tokens of one segment
    weight  [rows] 1 for rows that are trained, 0 for others, whose value is not read even if it is NaN
    """
    used = weight > 0
    return -(torch.where(used, logps, torch.zeros_like(logps)) * weight.to(logps.dtype)).sum()
