"""Tokens from logits by inverse CDF, with random numbers that depend on no layout."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

ROLLOUT_STREAM = 0x5109_0001
"""Keeps the rollouts' random numbers apart from those of cuts, orders and ties."""

BLOCK = 128
"""Columns of a block: its mass is summed first, and only one block a row is searched."""


def uniforms(seed: int, sample_index: int, rollout: int, count: int) -> np.ndarray:
    """`[count]` float64 in [0, 1): one number per position of one rollout, from a counter-based generator."""
    generator = np.random.Philox(key=[seed, ROLLOUT_STREAM], counter=[0, rollout, sample_index, 0])
    return np.random.Generator(generator).random(count)


def sample_tokens(
    logits: torch.Tensor,
    uniform: torch.Tensor,
    temperature: float,
    top_p: float,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Draw one token a row; all ranks of a group call it together and get the same tokens.

    logits   [rows, columns] of this rank, -inf for what may not be drawn; its ids begin at rank x columns
    uniform  [rows] float64 in [0, 1), the same on all ranks
    group    the ranks that the vocabulary is spread over; None: all of it is here
    returns  [rows] int64, ids of the whole vocabulary

    The cumulative distribution runs in vocabulary order. Probabilities are float32 and their sums beyond a block
    float64, which moves a boundary by less than 1e-6, so that the same weights give the same tokens at every layout
    except where a draw lies at a boundary.
    `temperature = 0` takes the likeliest token, the lowest id among equals.
    """
    if group is None or group.size() == 1:
        return _sample(logits, uniform, temperature, top_p)
    if temperature == 0.0:
        return _likeliest_over_ranks(logits, group)
    if top_p == 1.0:
        return _sample_over_ranks(logits, uniform, temperature, group)
    # The nucleus is known only to who sees the order of all tokens.
    whole = _gathered(logits, group).transpose(0, 1).flatten(1)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if group.rank() == 0:
        tokens = _sample(whole, uniform, temperature, top_p)
    dist.broadcast(tokens, group=group, group_src=0)
    return tokens


def _sample(logits: torch.Tensor, uniform: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    if temperature == 0.0:
        return logits.argmax(dim=1)  # the first among equals
    masses = _softmax(logits, temperature)
    blocks = _blocks(masses if top_p == 1.0 else _nucleus(masses, top_p))
    ends = _ends(blocks)
    return _find(blocks, ends, uniform * ends[:, -1])


def _likeliest_over_ranks(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Every rank's own likeliest, and then the likeliest of these: a choice by what all have alike."""
    own = logits.argmax(dim=1)  # the first among equals, here and below
    value = logits.gather(1, own[:, None]).squeeze(1).double()
    ids = (own + group.rank() * logits.shape[1]).double()
    values, ids = _gathered(torch.stack([value, ids]), group).unbind(1)
    return ids.gather(0, values.argmax(dim=0, keepdim=True)).squeeze(0).long()


def _sample_over_ranks(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, group: dist.ProcessGroup
) -> torch.Tensor:
    """Each rank sums its own columns; whose columns hold the draw follows from the sums, and that rank searches.

    The ranks meet twice: for maxima and sums, and for the tokens. What was drawn is one rank's word for all.
    """
    masses, rank = _softmax(logits, temperature), group.rank()
    blocks = _blocks(masses)
    own_ends = _ends(blocks)
    # The likeliest token has 1 / (sum of exp((logits - their maximum) / temperature)) of the mass of this rank.
    highest = logits.amax(dim=1).double()
    own_sum = torch.where(highest.isneginf(), 0.0, 1.0 / masses.amax(dim=1).double())
    highests, sums = _gathered(torch.stack([highest, own_sum]), group).unbind(1)
    sums = sums * ((highests - highests.amax(dim=0)) / temperature).exp()
    ends = sums.cumsum(dim=0).t().contiguous()
    target = uniform * ends[:, -1]
    owner = _first_behind(ends, target)
    share = (target - (ends[:, rank - 1] if rank else 0.0)) / sums[rank]
    tokens = _find(blocks, own_ends, share * own_ends[:, -1]) + rank * logits.shape[1]
    tokens = torch.where(owner == rank, tokens, -1)
    dist.all_reduce(tokens, op=dist.ReduceOp.MAX, group=group)
    return tokens


def _gathered(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`[ranks, ...]`, the tensors of all ranks."""
    parts = own.new_empty(group.size(), *own.shape)
    dist.all_gather(list(parts.unbind(0)), own.contiguous(), group=group)
    return parts


def _softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """`[rows, columns]` float32; not numbers in a row without any mass."""
    if temperature != 1.0:
        logits = logits.float() / temperature
    return torch.softmax(logits, dim=1, dtype=torch.float32)


def _nucleus(masses: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero everything outside the smallest set of likeliest tokens whose share reaches `top_p`. `[rows, vocab]`."""
    ordered, index = masses.double().sort(dim=1, descending=True, stable=True)
    ends = ordered.cumsum(dim=1)
    outside = ends - ordered >= top_p * ends[:, -1:]
    return masses.masked_fill(outside.scatter(1, index, outside), 0.0)


def _blocks(masses: torch.Tensor) -> torch.Tensor:
    """`[rows, blocks, BLOCK]`, with columns of zeros behind the last one where the blocks do not fit."""
    missing = -masses.shape[1] % BLOCK
    return (F.pad(masses, (0, missing)) if missing else masses).unflatten(1, (-1, BLOCK))


def _ends(blocks: torch.Tensor) -> torch.Tensor:
    """`[rows, blocks]` float64: the mass up to the end of each block."""
    return blocks.sum(dim=2).double().cumsum(dim=1)


def _first_behind(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first of the intervals `[rows, n]` that ends behind the target `[rows]`; at most the last that has mass."""
    found = torch.searchsorted(ends, target[:, None], right=True).squeeze(1)
    # The limit is for a target that rounding moved to the end; behind the last mass the ends stand still.
    return torch.minimum(found, (ends < ends[:, -1:]).sum(dim=1))


def _find(blocks: torch.Tensor, ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The column `[rows]` in which the cumulative mass passes the target: the block first, then inside of it."""
    block = _first_behind(ends, target)
    row = torch.arange(len(block), device=block.device)
    before = torch.where(block > 0, ends[row, block - 1], 0.0)
    inside = blocks[row, block].double().cumsum(dim=1)
    return block * BLOCK + _first_behind(inside, target - before)
