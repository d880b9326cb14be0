"""Where a document may be cut into prefix and suffix (paper section 2), from lengths alone, and the cut itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_sip.config.groups import DataConfig
from megatron_sip.errors import ConfigError

# A UTF-8 character has at most four bytes and a token at least one, so a boundary is at most three tokens away.
_SHIFTS = (0, 1, 2, 3, -1, -2, -3)

SKIP_EMPTY = "empty_document"
SKIP_SHORT = "document_below_minimum"
SKIP_NO_ROOM = "document_without_room_for_a_cut"
UNUSED_TAIL = "tokens_in_walk_tails"


@dataclass(frozen=True)
class CutRule:
    """The settings of a split, in tokens. Build it with `from_config`, which checks them."""

    mode: Literal["random", "walk"]
    suffix: int
    min_prefix: int
    max_prefix: int
    min_document: int

    @classmethod
    def from_config(cls, config: DataConfig) -> CutRule:
        """The rule of the data settings, defaults filled in.

        Raises:
            ConfigError: lengths that leave nothing to cut; the message names the flags.
        """
        suffix, min_prefix = config.suffix_length, config.min_prefix_length
        if suffix < 1 or min_prefix < 1:
            raise ConfigError(
                f"--suffix-length {suffix} and --min-prefix-length {min_prefix} must both be at least 1 token"
            )
        room = config.seq_length - suffix
        max_prefix = room if config.max_prefix_length is None else config.max_prefix_length
        if max_prefix > room:
            raise ConfigError(
                f"--max-prefix-length {max_prefix} plus --suffix-length {suffix} is more than --seq-length "
                f"{config.seq_length}; lower one or raise --seq-length"
            )
        if max_prefix < min_prefix:
            raise ConfigError(
                f"--min-prefix-length {min_prefix} is more than the longest prefix of {max_prefix} tokens "
                "(--max-prefix-length, else --seq-length minus --suffix-length); lower it or raise --seq-length"
            )
        given = config.min_document_length
        return cls(config.split_mode, suffix, min_prefix, max_prefix, min_prefix + suffix if given is None else given)

    @property
    def needed(self) -> int:
        """Tokens of the shortest document that has room for a cut."""
        return self.min_prefix + self.suffix

    def settings(self) -> dict[str, int | str]:
        """What must be equal for two streams to cut alike."""
        return {
            "split_mode": self.mode,
            "suffix_length": self.suffix,
            "min_prefix_length": self.min_prefix,
            "max_prefix_length": self.max_prefix,
            "min_document_length": self.min_document,
        }


def plan_cuts(lengths: npt.NDArray[np.int64], rule: CutRule) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
    """How many cuts each document offers in an epoch, and what was left out and why.

    lengths  [documents] without EOD
    returns  [documents] cuts (random: 0 or 1; walk: as many whole suffixes as fit behind the shortest prefix),
             and counts: documents by reason, and for walk the tokens behind the last whole suffix
    """
    empty = lengths == 0
    short = ~empty & (lengths < rule.min_document)
    no_room = ~empty & ~short & (lengths < rule.needed)
    usable = ~(empty | short | no_room)
    room = lengths - rule.min_prefix
    cuts = np.where(usable, 1 if rule.mode == "random" else room // rule.suffix, 0).astype(np.int64)
    skipped = {SKIP_EMPTY: int(empty.sum()), SKIP_SHORT: int(short.sum()), SKIP_NO_ROOM: int(no_room.sum())}
    if rule.mode == "walk":
        skipped[UNUSED_TAIL] = int((room[usable] % rule.suffix).sum())
    return cuts, skipped


def nominal_position(length: int, ordinal: int, uniform: float, rule: CutRule) -> int:
    """Where the suffix starts before it is moved to a character boundary.

    Walk: suffix number `ordinal` behind the shortest prefix. Random: `uniform` in [0, 1) over all positions that
    leave a shortest prefix and a whole suffix.
    """
    if rule.mode == "walk":
        return rule.min_prefix + ordinal * rule.suffix
    choices = length - rule.needed + 1
    return rule.min_prefix + min(int(uniform * choices), choices - 1)


def settle_position(nominal: int, length: int, rule: CutRule, is_boundary: Callable[[int], bool]) -> int:
    """The nearest position that is also a character boundary (later ones first), else the nominal one.

    In walk mode a cut moved forward makes two neighbours share up to three tokens; only text of several tokens
    a character, such as emoji, is moved at all.
    """
    for shift in _SHIFTS:
        position = nominal + shift
        if rule.min_prefix <= position <= length - rule.suffix and is_boundary(position):
            return position
    return nominal


def prefix_start(position: int, rule: CutRule) -> int:
    """First token of the prefix of a cut: the last `max_prefix` tokens before it, or all there are."""
    return max(0, position - rule.max_prefix)
