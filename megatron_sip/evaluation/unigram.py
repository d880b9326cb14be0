"""The held-out loss of a unigram model: what a language model must beat before it has learnt any order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from megatron_sip.errors import DataError


def count_tokens(documents: Iterable[npt.NDArray[np.integer]], vocab_size: int) -> npt.NDArray[np.int64]:
    """`[vocab_size]` counts of token ids. DataError for an id outside the vocabulary."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in documents:
        if tokens.size == 0:
            continue
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            raise DataError(
                f"the corpus holds token {int(tokens.max())}, the vocabulary has {vocab_size}; "
                "preprocess it with the tokenizer of --tokenizer-model"
            )
        counts += np.bincount(tokens.astype(np.int64), minlength=vocab_size)
    return counts


def unigram_nats_per_token(train: npt.NDArray[np.int64], held_out: npt.NDArray[np.int64]) -> float:
    """Mean negative log-probability (nats) of the held-out tokens under add-one smoothed train counts.

    p(t) = (train[t] + 1) / (sum(train) + V); both arrays are `[V]` counts. DataError for no held-out token.
    """
    if train.shape != held_out.shape or train.ndim != 1:
        raise ValueError(f"counts must be of one vocabulary: {train.shape} against {held_out.shape}")
    total = int(held_out.sum())
    if total == 0:
        raise DataError("the held-out corpus has no token; give it at least one document")
    log_probability = np.log(train + 1.0) - np.log(train.sum() + float(train.size))
    return float(-(held_out * log_probability).sum() / total)
