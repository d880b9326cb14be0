"""What a step computed, from the true lengths of its prefixes and rows.

Counted as in `flops.py`, but for what the formulas of a plan leave to the mean: every prefix and suffix has its own
length, the first token of a rollout comes from its prefix' pass and its last one is never fed, and the last layer does
without scores, output projection and MLP at positions whose logits nobody reads. Padding is no work, nor are rows that
have ended and wait for others, nor what is computed again to save memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from megatron_sip.cost.flops import Flops, causal_pairs, forward_flops
from megatron_sip.cost.sizes import ModelSizes


@dataclass(frozen=True)
class DoneWork:
    """The sizes of forward passes; sums of them are such sizes again.

    tokens         that went through the layers
    pairs          (query, key) pairs of a layer
    logits         positions at the LM head
    spared_tokens  of `tokens` those that the last layer takes no further than to query, key and value
    spared_pairs   of `pairs` those that it leaves out
    """

    tokens: int = 0
    pairs: int = 0
    logits: int = 0
    spared_tokens: int = 0
    spared_pairs: int = 0

    def __add__(self, other: DoneWork) -> DoneWork:
        return DoneWork(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))


def rollout_work(prefixes: Iterable[int], rows: Iterable[Sequence[int]]) -> DoneWork:
    """The passes that wrote rollouts: each prefix once, then its rows token by token.

    prefixes  tokens of each prefix, at least 1
    rows      of each prefix the tokens of its continuations, each at least 1
    """
    return sum(map(_written, prefixes, rows), DoneWork())


def _written(prefix: int, rows: Sequence[int]) -> DoneWork:
    fed = [row - 1 for row in rows]
    return DoneWork(
        tokens=prefix + sum(fed),
        pairs=causal_pairs(prefix) + sum(causal_pairs(count, prefix) for count in fed),
        logits=1 + sum(fed),
        spared_tokens=prefix - 1,
        spared_pairs=causal_pairs(prefix) - prefix,
    )


def row_work(layout: Iterable[Sequence[int]], *, copies: int = 1, with_prefix: bool, confined: bool) -> DoneWork:
    """One forward pass of trained rows, those without a valid pair too.

    layout       prefix, chosen and rejected length of each row
    copies       how often the prefix of a row is computed: 2 for pairs as two rows
    with_prefix  whether all its tokens but the first are scored as well
    confined     whether the last layer confines itself to scored positions
    """
    rows = (_scored(prefix, chosen, rejected, copies, with_prefix, confined) for prefix, chosen, rejected in layout)
    return sum(rows, DoneWork())


def _scored(prefix: int, chosen: int, rejected: int, copies: int, with_prefix: bool, confined: bool) -> DoneWork:
    suffixes = (chosen, rejected)
    pairs = copies * causal_pairs(prefix) + sum(causal_pairs(suffix, prefix) for suffix in suffixes)
    # A suffix token is scored by the position before it, whose query sees one key less than its own would.
    wanted = sum(causal_pairs(suffix, prefix - 1) for suffix in suffixes)
    return DoneWork(
        tokens=copies * prefix + chosen + rejected,
        pairs=pairs,
        logits=chosen + rejected + (prefix - 1 if with_prefix else 0),
        spared_tokens=copies * prefix if confined else 0,
        spared_pairs=pairs - wanted if confined else 0,
    )


def done_flops(model: ModelSizes, work: DoneWork) -> Flops:
    """Operations of forward passes of these sizes."""
    one_layer = 2.0 * model.output_and_mlp_parameters * work.spared_tokens
    attention = 4.0 * model.num_attention_heads * model.kv_channels * work.spared_pairs
    spared = Flops(linear=one_layer, attention=attention)
    return forward_flops(model, work.tokens, work.pairs, work.logits) + -1 * spared
