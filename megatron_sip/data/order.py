"""The order in which an epoch is trained: functions of (seed, epoch) and the global sample index."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from megatron_sip.errors import ConfigError

_WORD = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for; each has a stream of its own, apart from those of pairs and rollouts."""

    CUT_POSITION = 0x5109_0101
    EPOCH_ORDER = 0x5109_0102
    WALK_ORDER = 0x5109_0103
    WINDOW_ORDER = 0x5109_0104


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """A counter-based generator keyed by seed, purpose and up to two numbers; no global state."""
    counter = [0, *place, *([0] * (3 - len(place)))]
    bits = np.random.Philox(key=[seed & _WORD, int(purpose)], counter=[word & _WORD for word in counter])
    return np.random.Generator(bits)


def epoch_permutation(count: int, seed: int, purpose: Purpose, epoch: int) -> npt.NDArray[np.int64]:
    """`[count]` indices in the order of this epoch."""
    return generator(seed, purpose, epoch).permutation(count)


def rank_share(global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """The contiguous part of a global batch that one data parallel rank trains; the parts in rank order are the whole.

    Raises:
        ConfigError: the batch does not divide.
    """
    if global_batch_size % dp_size:
        raise ConfigError(
            f"--global-batch-size {global_batch_size} does not divide over {dp_size} data parallel ranks; "
            "make it a multiple of world size / (tensor x pipeline x context parallel size)"
        )
    share = global_batch_size // dp_size
    return range(dp_rank * share, (dp_rank + 1) * share)


def slot_batches(count: int, phase: int, batch_size: int) -> npt.NDArray[np.int64]:
    """`[count]` the global batch of each place of an epoch that begins `phase` samples into a batch."""
    return (np.arange(count, dtype=np.int64) + phase) // batch_size


def deal_apart(
    owner: npt.NDArray[np.int64], phase: int, batch_size: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """An order of an epoch in which no owner has two items in one global batch, where that is possible.

    owner    [count] which document each item (cut) is of, items of one document adjacent
    phase    samples of the epoch's first global batch that belong to the epoch before
    returns  [count] item at each place of the epoch

    Items are dealt like cards: documents one after the other, one item to each batch in turn. A document with
    no more items than there are batches then never meets a batch twice. Batches that are not full (the first
    and the last of an epoch) drop out of the later rounds, so documents long enough to feel it are dealt first.
    """
    count = len(owner)
    first = np.flatnonzero(np.concatenate([[True], owner[1:] != owner[:-1]]))
    sizes = np.diff(np.append(first, count))
    batch_of = slot_batches(count, phase, batch_size)
    batches = int(batch_of[-1]) + 1
    shuffled = rng.permutation(len(first))
    heavy = sizes[shuffled] >= max(1, batches - 2)
    light = shuffled[~heavy]
    large = shuffled[heavy]
    queue = np.concatenate([large[np.argsort(-sizes[large], kind="stable")], light])
    items = _concatenated_ranges(first[queue], sizes[queue])
    # Places in dealing order: round by round, in each round the batches in one shuffled order.
    begins = np.searchsorted(batch_of, np.arange(batches))
    place_round = np.arange(count) - begins[batch_of]
    turn = rng.permutation(batches)
    slots = np.full((int(place_round.max()) + 1) * batches, -1, dtype=np.int64)
    slots[place_round * batches + turn[batch_of]] = np.arange(count)
    order = np.empty(count, dtype=np.int64)
    order[slots[slots >= 0]] = items
    return _shuffle_within(order, batch_of, rng)


def _concatenated_ranges(starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`starts[0] .. starts[0]+sizes[0]-1, starts[1] ...` in one array."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]), dtype=np.int64) + np.repeat(starts - (ends - sizes), sizes)


def _shuffle_within(
    order: npt.NDArray[np.int64], batch_of: npt.NDArray[np.int64], rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Shuffle the items of each batch among themselves."""
    # The whole part keeps the batches in order, the fraction is the draw.
    return order[np.argsort(batch_of + rng.random(len(order)), kind="stable")]


def repair_seam(
    order: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    taken: npt.NDArray[np.int64],
    phase: int,
    batch_size: int,
) -> npt.NDArray[np.int64]:
    """Keep documents of the epoch before out of the global batch that two epochs share, by swaps with later batches.

    taken  documents that the epoch before put into that batch

    The last batch of the epoch is left alone if it is not full: the next epoch's repair looks at it as it was
    dealt. What finds no partner stays and is counted as forced.
    """
    order = order.copy()
    count = len(order)
    batch_of = slot_batches(count, phase, batch_size)
    last = int(batch_of[-1])
    whole = count if (count + phase) % batch_size == 0 else int(np.searchsorted(batch_of, last))
    seam = int(np.searchsorted(batch_of, 1))
    held = set(taken.tolist())
    for place in range(min(seam, whole)):
        if int(owner[order[place]]) not in held:
            continue
        for other in range(seam, whole):
            if _may_swap(order, owner, batch_of, place, other, held):
                order[place], order[other] = order[other], order[place]
                break
    return order


def _may_swap(
    order: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    batch_of: npt.NDArray[np.int64],
    place: int,
    other: int,
    held: set[int],
) -> bool:
    """Whether swapping leaves both batches without a document that they have twice."""
    leaving, coming = int(owner[order[place]]), int(owner[order[other]])
    if coming in held or coming == leaving:
        return False
    here = owner[order[_batch_range(batch_of, place)]]
    there = owner[order[_batch_range(batch_of, other)]]
    return coming not in here and leaving not in there


def _batch_range(batch_of: npt.NDArray[np.int64], place: int) -> slice:
    batch = batch_of[place]
    return slice(int(np.searchsorted(batch_of, batch)), int(np.searchsorted(batch_of, batch, side="right")))


def count_shared(owner_at: npt.NDArray[np.int64], batch_of: npt.NDArray[np.int64]) -> int:
    """Cuts that share their global batch with an earlier cut of the same document."""
    pairs = np.stack([batch_of, owner_at])
    return int(pairs.shape[1] - np.unique(pairs, axis=1).shape[1])
