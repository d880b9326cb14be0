"""Tokens from logits by inverse CDF, with random numbers that depend on no layout."""

from __future__ import annotations

import numpy as np
import torch

ROLLOUT_STREAM = 0x5109_0001
"""Keeps the rollouts' random numbers apart from those of cuts, orders and ties."""


def uniforms(seed: int, sample_index: int, rollout: int, count: int) -> np.ndarray:
    """`[count]` float64 in [0, 1): one number per position of one rollout, from a counter-based generator."""
    generator = np.random.Philox(key=[seed, ROLLOUT_STREAM], counter=[0, rollout, sample_index, 0])
    return np.random.Generator(generator).random(count)


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero everything outside the smallest set of likeliest tokens whose mass reaches `top_p`. `[rows, vocab]`."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probabilities.masked_fill(outside.scatter(-1, index, outside), 0.0)


def sample_tokens(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draw one token a row.

    logits   [rows, vocab], -inf for what may not be drawn
    uniform  [rows] float64 in [0, 1)
    returns  [rows] int64

    The cumulative distribution runs in vocabulary order and in float64, so that the same weights give the
    same tokens at every layout except where a draw lies at a boundary. `temperature = 0` takes the likeliest
    token, the lowest id among equals.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    probabilities = torch.softmax(logits.double() / temperature, dim=-1)
    if top_p < 1.0:
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(dim=-1)
    # Scaling by the row's own total keeps a draw inside the distribution whatever its rounding; the last token
    # with mass is the upper limit because behind it the cumulative sum stands still.
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    return torch.minimum(drawn, last)
