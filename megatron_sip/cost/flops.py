"""Floating point operations of one SIP step, by part.

A multiplication and an addition count as two. Counted are the matrix products: the linear layers, attention over the
(query, key) pairs that the causal mask leaves, and the LM head where logits are wanted. Norms, rotary angles, softmax
and the optimizer are left out: they are bound by memory, not by arithmetic. A backward pass counts twice its forward
pass; what is computed again to save memory does not count. Micro-batches, gradient accumulation and layout change
nothing here.

Without attention and head, with N = `ModelSizes.matmul_parameters`, batch 1 and pairs, the parts are (docs/scaling.md):

    part        prefix computed for each row    prefix computed once
    rollouts    2N * K (P + S)                  2N * (P + K S)
    reference   2N * 2 (P + S)                  2N * (P + 2S)
    train       6N * 2 (P + S)                  6N * (P + 2S)
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_sip.cost.sizes import ModelSizes


@dataclass(frozen=True)
class Flops:
    """Operations by what they are spent on; sums and multiples of them are such counts again."""

    linear: float = 0.0
    attention: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.head

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention, self.head + other.head)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.linear * times, self.attention * times, self.head * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class StepWork:
    """What one step computes. Lengths are in tokens.

    prefix          tokens of a prefix (P)
    suffix          tokens of a suffix (S), of every rollout and of every trained candidate
    rollouts        continuations of a prefix (K); 0 writes none
    batch           prefixes of the step, over all ranks
    trained_rows    rows of the trained batch; None: one for each prefix. Rows without a valid pair are computed too
    suffixes        candidates in a row: 2 for a pair, 1 for the objectives without a rejected one
    reference       whether a reference policy scores the rows
    prefix_logits   whether the prefix is trained as well (--prefix-ntp-weight above 0)
    prefill_once    a prefix is prefilled once for its K rollouts, else once for each
    share_prefix    a row is [prefix | chosen | rejected], else each candidate has a row with a prefix of its own
    """

    prefix: int
    suffix: int
    rollouts: int
    batch: int
    trained_rows: int | None = None
    suffixes: int = 2
    reference: bool = True
    prefix_logits: bool = False
    prefill_once: bool = True
    share_prefix: bool = True

    def __post_init__(self) -> None:
        if min(self.prefix, self.suffix, self.batch) < 1 or self.rollouts < 0 or (self.trained_rows or 0) < 0:
            raise ValueError(f"prefix, suffix and batch must be at least 1, rollouts and rows not negative: {self}")
        if self.suffixes not in (1, 2):
            raise ValueError(f"a row has 1 or 2 suffixes, not {self.suffixes}")

    @property
    def rows(self) -> int:
        """Rows that are trained."""
        return self.batch if self.trained_rows is None else self.trained_rows

    @property
    def prefix_copies(self) -> int:
        """How often the prefix of a row is computed."""
        return 1 if self.share_prefix else self.suffixes

    @property
    def row_tokens(self) -> int:
        """Tokens that a row takes through the layers."""
        return self.prefix_copies * self.prefix + self.suffixes * self.suffix


@dataclass(frozen=True)
class StepFlops:
    """The parts of a step in the order in which they run."""

    prefill: Flops
    decode: Flops
    reference: Flops
    train: Flops

    @property
    def rollouts(self) -> Flops:
        """Prefill and decode."""
        return self.prefill + self.decode

    @property
    def total(self) -> float:
        """Operations of the whole step; over a machine's matmul rate they are the floor of its seconds."""
        return sum(getattr(self, part.name).total for part in fields(self))


def causal_pairs(tokens: int, before: int = 0) -> int:
    """(query, key) pairs of `tokens` in a row, each of which sees itself, those before it and `before` more."""
    return tokens * before + tokens * (tokens + 1) // 2


def forward_flops(model: ModelSizes, tokens: float, pairs: float, logits: float) -> Flops:
    """A forward pass of `tokens` with `pairs` of (query, key) in each layer and `logits` positions at the head."""
    width = model.num_attention_heads * model.kv_channels
    return Flops(
        linear=2.0 * model.matmul_parameters * tokens,
        # Two products, query with key and weight with value, of 2 operations for each element of a head.
        attention=4.0 * model.num_layers * width * pairs,
        head=2.0 * model.head_parameters * logits,
    )


def prefill_flops(model: ModelSizes, work: StepWork) -> Flops:
    """The pass over the prefixes before the first sampled token. Its one position of logits counts with decoding."""
    copies = 0 if work.rollouts == 0 else work.batch * (1 if work.prefill_once else work.rollouts)
    return copies * forward_flops(model, work.prefix, causal_pairs(work.prefix), 0)


def decode_flops(model: ModelSizes, work: StepWork) -> Flops:
    """The passes of single tokens, S for each rollout, as in the formulas.

    S - 1 would do, because the prefill gives the logits of the first and the last is never fed: 0.8 % at S = 128.
    """
    pairs = causal_pairs(work.suffix, work.prefix)
    return work.batch * work.rollouts * forward_flops(model, work.suffix, pairs, work.suffix)


def row_flops(model: ModelSizes, work: StepWork) -> Flops:
    """The forward pass of the trained rows, logits at the scored positions."""
    pairs = work.prefix_copies * causal_pairs(work.prefix) + work.suffixes * causal_pairs(work.suffix, work.prefix)
    logits = work.suffixes * work.suffix + (work.prefix - 1 if work.prefix_logits else 0)
    return work.rows * forward_flops(model, work.row_tokens, pairs, logits)


def step_flops(model: ModelSizes, work: StepWork) -> StepFlops:
    """One SIP step."""
    row = row_flops(model, work)
    return StepFlops(
        prefill=prefill_flops(model, work),
        decode=decode_flops(model, work),
        reference=row if work.reference else Flops(),
        train=3 * row,
    )


def plain_flops(model: ModelSizes, work: StepWork) -> Flops:
    """Next-token training on the same documents: 6N (P + S), with attention and logits everywhere."""
    tokens = work.prefix + work.suffix
    return 3 * work.batch * forward_flops(model, tokens, causal_pairs(tokens), tokens - 1)
