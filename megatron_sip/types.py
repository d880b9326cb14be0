"""What flows through one SIP step: cuts, candidates, verdicts, scores, pairs and the batch that is trained.

Every stage of the package knows only these types and the stage before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

TokenArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """One document cut into a prefix and its suffix (paper section 2).

    `sample_index` counts cuts from the start of training (it grows over epochs); `document` and
    `position` name the place in the corpus: the suffix starts at token `position` of `document`.
    `prefix` is `[prefix_len]`, `suffix` is `[suffix_len]`; neither spans an end-of-document token.
    """

    sample_index: int
    document: int
    position: int
    prefix: TokenArray
    suffix: TokenArray


class CandidateKind(StrEnum):
    """Where a candidate suffix comes from."""

    ORIGINAL = "original"
    REWRITE = "rewrite"
    ROLLOUT = "rollout"


@dataclass(frozen=True)
class Candidate:
    """One possible suffix: `tokens` is `[length]` and is what is trained; `text` is what a judge reads."""

    kind: CandidateKind
    tokens: tuple[int, ...]
    text: str
    rollout_index: int | None = None


@dataclass(frozen=True)
class Pool:
    """The candidates of one cut, with the texts that judges need around them.

    `original_text` is the human suffix even when the original is not a candidate: the factuality
    judge takes it as reference (paper section 3).
    """

    sample_index: int
    prefix_text: str
    original_text: str
    candidates: tuple[Candidate, ...]


class MissingReason(StrEnum):
    """Why a value that was asked for is not there."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    HTTP_STATUS = "http_status"
    MALFORMED = "malformed"
    TRUNCATED = "truncated"
    UNPARSABLE = "unparsable"
    LOW_LABEL_MASS = "low_label_mass"
    TOO_LONG = "too_long"
    TOO_SHORT = "too_short"
    EMPTY = "empty"
    TOO_FEW_ANSWERS = "too_few_answers"


@dataclass(frozen=True)
class Missing:
    """A value that was asked for and did not arrive; never a number in disguise."""

    reason: MissingReason
    detail: str = ""


class Question(NamedTuple):
    """One call to a judge about the pool of one cut.

    `second` is None for a pointwise judge. For a pairwise judge `first` is shown as option 1 and
    `second` as option 2; indices point into the list of distinct candidates of the pool.
    """

    judge: str
    first: int
    second: int | None = None
    vote: int = 0


Verdict: TypeAlias = float | Missing
"""In [0, 1]. Pairwise: the share of belief that option 1 (`first`) wins. Pointwise: the score of `first`."""

Answers: TypeAlias = dict[Question, Verdict]


@dataclass(frozen=True)
class Scores:
    """Scores of a pool after missing verdicts were dealt with.

    `total[i]` is the weighted sum over judges of candidate i, or the `Missing` that put it out of the
    pool; `by_judge[name][i]` is one judge's part. `missing_by_reason` counts verdicts, not candidates.
    """

    total: tuple[Verdict, ...]
    by_judge: dict[str, tuple[Verdict, ...]]
    questions_asked: int = 0
    missing_by_reason: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """The chosen and the rejected candidate of one cut; `rejected` is None for objectives without one."""

    chosen: Candidate
    rejected: Candidate | None
    chosen_score: float | None = None
    rejected_score: float | None = None


class NoPairReason(StrEnum):
    """Why a cut trains nothing this step; each is counted in the metrics."""

    TIE = "tie"
    TOO_FEW_CANDIDATES = "too_few_candidates"
    IDENTICAL_TOKENS = "identical_tokens"
    MISSING_REWRITE = "missing_rewrite"
    MISSING_ROLLOUT = "missing_rollout"


@dataclass(frozen=True)
class NoPair:
    """A cut that trains nothing, and why."""

    reason: NoPairReason


@dataclass(frozen=True)
class PreferenceBatch:
    """Rows `[prefix | chosen | rejected | padding]`, one a pair, ready for the model.

    Both suffixes continue the same prefix: each sees the prefix and itself, and both start at position
    `prefix_length`. A row without a pair has `valid = 0` and still runs (all ranks do the same
    collectives). An RF-NLL or SFT row has `rejected_length = 0`; an NTP row is all prefix.

    tokens           [rows, width] int64, padding id 0 (never in a loss)
    prefix_length    [rows] int64
    chosen_length    [rows] int64
    rejected_length  [rows] int64
    valid            [rows] float32, 1 or 0
    sample_index     [rows] int64, the cut's global sample index
    """

    tokens: torch.Tensor
    prefix_length: torch.Tensor
    chosen_length: torch.Tensor
    rejected_length: torch.Tensor
    valid: torch.Tensor
    sample_index: torch.Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.tokens.shape[0])

    @property
    def width(self) -> int:
        """Padded row length, at least prefix + chosen + rejected of every row."""
        return int(self.tokens.shape[1])

    def layout(self) -> torch.Tensor:
        """`[rows, 3]` int64: prefix, chosen and rejected length, which is all that attention needs."""
        return torch.stack([self.prefix_length, self.chosen_length, self.rejected_length], dim=1)

    def to(self, device: torch.device) -> PreferenceBatch:
        """The same rows with every tensor on `device`."""
        return PreferenceBatch(
            tokens=self.tokens.to(device),
            prefix_length=self.prefix_length.to(device),
            chosen_length=self.chosen_length.to(device),
            rejected_length=self.rejected_length.to(device),
            valid=self.valid.to(device),
            sample_index=self.sample_index.to(device),
        )

    def take(self, rows: Sequence[int], width: int | None = None) -> PreferenceBatch:
        """These rows in this order (a micro-batch), cut to `width`, which must hold all their tokens; None keeps it."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.tokens.device)
        return PreferenceBatch(
            tokens=self.tokens[index, :width],
            prefix_length=self.prefix_length[index],
            chosen_length=self.chosen_length[index],
            rejected_length=self.rejected_length[index],
            valid=self.valid[index],
            sample_index=self.sample_index[index],
        )
