"""Bytes that a wave of rollouts takes on one rank, from sizes alone; for the trainer and for the planner."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
DOUBLE = 8


@dataclass(frozen=True)
class StageSizes:
    """What one rank of a pipeline stage computes with.

    heads, groups, ffn  of this rank: its share of query heads, of key and value heads, and of the feed-forward's width
    columns             of the padded vocabulary, this rank's share; 0 on a stage without LM head
    tp                  ranks that share all these
    element             bytes of an activation and of a cached number
    """

    layers: int
    hidden: int
    heads: int
    groups: int
    head_width: int
    ffn: int
    columns: int
    tp: int
    element: int


@dataclass(frozen=True)
class WaveShape:
    """How a wave is written.

    width      tokens of the longest prefix
    rollouts   rows of a prefix (K)
    tokens     of a row at most
    pipelined  groups of prefixes that are prefilled and decoded apart
    copies     of a prefix' keys and values; 1 where its rows share them
    """

    width: int
    rollouts: int
    tokens: int
    pipelined: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    copies: int = 1


@dataclass(frozen=True)
class WaveBytes:
    """Keys and values of the prefixes, those of the rows, the drawn tokens, and two kinds of passes of one group.

    A stage prefills all groups before it decodes the first; the rows have no keys and values until then.
    """

    prefixes: int
    rows: int
    drawn: int
    prefill: int
    step: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.prefixes + self.drawn + max(self.prefill, self.rows + self.step)


def wave_bytes(sizes: StageSizes, shape: WaveShape, prefixes: int) -> WaveBytes:
    """What a wave of so many prefixes takes, if all are as long as the longest.

    Weights are not counted, nor what a matrix library or an allocator takes besides.
    """
    rows, together = prefixes * shape.rollouts, -(-prefixes // shape.pipelined)
    key_and_value = 2 * sizes.layers * sizes.groups * sizes.head_width * sizes.element
    row = max(_layer_bytes(sizes) + _attention_bytes(sizes, shape), _logit_bytes(sizes, shape))
    return WaveBytes(
        prefixes=key_and_value * prefixes * shape.copies * shape.width,
        rows=key_and_value * rows * shape.tokens,
        # A token and the random number that draws it.
        drawn=rows * shape.tokens * 2 * DOUBLE,
        prefill=together * shape.width * _layer_bytes(sizes),
        step=together * shape.rollouts * row,
    )


def most_prefixes(sizes: StageSizes, shape: WaveShape, budget: float, prefixes: int) -> int:
    """The largest wave of at most so many prefixes that fits the budget, in bytes; 0 where not even one does."""
    fits = [count for count in range(1, prefixes + 1) if wave_bytes(sizes, shape, count).peak <= budget]
    return max(fits, default=0)


def even_wave(prefixes: int, most: int) -> int:
    """Prefixes of a wave where at most so many fit: as few waves as that, and as equal as they can be."""
    return -(-prefixes // -(-prefixes // most))


def _layer_bytes(sizes: StageSizes) -> int:
    """The most that a position takes within a layer while nothing is kept for a backward pass.

    In attention the residual and its norm, the fused projection, queries and keys before and after their rotation, and
    the output by row and by position. In the feed-forward the residual before and behind attention, its norm and the
    projected output, both halves of the first product, the gate behind SiLU, the other half once more, and the product.
    """
    query, key = sizes.heads * sizes.head_width, sizes.groups * sizes.head_width
    attention = 2 * sizes.hidden + 7 * query + 3 * key
    feed_forward = 4 * sizes.hidden + 5 * sizes.ffn
    return sizes.element * max(attention, feed_forward)


def _attention_bytes(sizes: StageSizes, shape: WaveShape) -> int:
    """Scores of a row's one query over its prefix and its own tokens: as products, and as weights in fp32 and again."""
    kinds = FLOAT if sizes.element == FLOAT else 2 * sizes.element + FLOAT
    return sizes.heads * (shape.width + shape.tokens) * kinds


def _logit_bytes(sizes: StageSizes, shape: WaveShape) -> int:
    """Logits of a row and what `sample_tokens` makes of them.

    A rank draws from its own columns: logits in the run's type, and their probabilities in fp32, divided by the
    temperature first. A nucleus is found on one rank over the whole vocabulary, gathered and brought in order of ids,
    and sorted in fp64: values, places, sums, what is before each, and a mask.
    """
    if shape.temperature == 0:
        return sizes.columns * sizes.element
    # The block of columns in which the draw is found, and its sums in fp64 (sampling.BLOCK).
    found = 128 * (FLOAT + 2 * DOUBLE)
    scaled = FLOAT if shape.temperature != 1 or sizes.element != FLOAT else 0
    if shape.top_p == 1:
        return sizes.columns * (sizes.element + FLOAT + scaled) + found
    whole = sizes.columns * sizes.tp
    gathered = 2 * whole * sizes.element if sizes.tp > 1 else 0
    return sizes.columns * sizes.element + gathered + whole * (FLOAT + 4 * DOUBLE + 1)
