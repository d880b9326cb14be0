"""Plain next-token data: the corpus as one line of tokens, cut into windows of one length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sip.data.cursor import Ranges, sample_indices
from megatron_sip.data.documents import Corpus
from megatron_sip.data.order import Purpose, epoch_permutation, rank_share
from megatron_sip.data.resume import check_same
from megatron_sip.errors import ConfigError, DataError
from megatron_sip.types import Cut, TokenArray

UNUSED_END = "tokens_behind_the_last_window"
SKIP_EMPTY = "empty_document"


class PackedStream:
    """Windows of `seq_length` tokens over all documents, each followed by one EOD; windows do not overlap.

    A window is a `Cut` whose `prefix` is the whole window, EOD tokens included, and whose `suffix` is empty;
    `document` and `position` say where it begins. Order and resume are those of `CutStream`: shuffled by
    (seed, epoch), a function of the global sample index alone.

    Raises:
        ConfigError: a batch or window size below 1 (a window needs 2 tokens).
        DataError: the corpus is shorter than one window.
    """

    def __init__(self, corpus: Corpus, seq_length: int, seed: int, global_batch_size: int) -> None:
        if seq_length < 2 or global_batch_size < 1:
            raise ConfigError(
                f"--seq-length {seq_length} must be at least 2 and --global-batch-size {global_batch_size} at least 1"
            )
        self._corpus, self._seq_length, self._seed, self._batch_size = corpus, seq_length, seed, global_batch_size
        lengths = corpus.lengths
        # An empty document takes no place, not even that of its EOD.
        self._documents = np.flatnonzero(lengths)
        self._ends: npt.NDArray[np.int64] = np.cumsum(lengths[self._documents] + 1)
        total = int(self._ends[-1]) if len(self._ends) else 0
        self.samples_per_epoch = total // seq_length
        if self.samples_per_epoch == 0:
            raise DataError(
                f"--data-path {' '.join(corpus.prefixes)} holds {total} tokens, fewer than one window of --seq-length "
                f"{seq_length}; lower --seq-length or give more text"
            )
        self._skipped = {
            SKIP_EMPTY: corpus.num_documents - len(self._documents),
            UNUSED_END: total % seq_length,
        }
        self._fingerprint = corpus.fingerprint()
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def skipped(self) -> dict[str, int]:
        """What one epoch leaves out: empty documents, and the tokens behind the last whole window."""
        return dict(self._skipped)

    def epoch_of(self, sample_index: int) -> int:
        """The epoch of a sample."""
        return sample_index // self.samples_per_epoch

    def batch(self, consumed_samples: int, dp_rank: int = 0, dp_size: int = 1, jumped: Ranges = ()) -> list[Cut]:
        """This rank's windows of the global batch that follows `consumed_samples`; `jumped` ones are left out.

        Raises:
            ConfigError: the global batch does not divide over `dp_size`.
        """
        share = rank_share(self._batch_size, dp_rank, dp_size)
        indices = sample_indices(consumed_samples, self._batch_size, jumped)
        return [self.window(indices[place]) for place in share]

    def window(self, sample_index: int) -> Cut:
        """The window with this global sample index."""
        epoch, place = divmod(sample_index, self.samples_per_epoch)
        if self._order is None or self._order[0] != epoch:
            permutation = epoch_permutation(self.samples_per_epoch, self._seed, Purpose.WINDOW_ORDER, epoch)
            self._order = (epoch, permutation)
        begin = int(self._order[1][place]) * self._seq_length
        row = int(np.searchsorted(self._ends, begin, side="right"))
        position = begin - (int(self._ends[row - 1]) if row else 0)
        tokens = self._collect(row, position)
        return Cut(sample_index, int(self._documents[row]), position, tokens, np.zeros(0, dtype=np.int64))

    def _collect(self, row: int, position: int) -> TokenArray:
        """`[seq_length]` tokens from `position` of the `row`-th filled document on, EOD behind each document."""
        window = np.empty(self._seq_length, dtype=np.int64)
        filled = 0
        while filled < self._seq_length:
            document = int(self._documents[row])
            length = self._corpus.length(document)
            stop = min(length, position + self._seq_length - filled)
            window[filled : filled + stop - position] = self._corpus.tokens(document, position, stop)
            filled += stop - position
            if filled < self._seq_length:
                window[filled] = self._corpus.eod
                filled += 1
            row, position = row + 1, 0
        return window

    def state_dict(self, consumed_samples: int) -> dict[str, Any]:
        """What a resume needs: the position, and what must be unchanged for it to mean the same samples."""
        return {"consumed_samples": consumed_samples, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": "packed",
            "data_fingerprint": self._fingerprint,
            "seed": self._seed,
            "seq_length": self._seq_length,
        }

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The consumed samples of a saved state.

        Raises:
            DataError: it was saved with other data or other settings.
        """
        return check_same(state, self._identity())
