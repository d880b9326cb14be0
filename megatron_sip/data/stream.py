"""Cuts in a seeded order that depends on the global sample index alone: the same at every data parallel size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_sip.config.groups import DataConfig
from megatron_sip.data.cursor import Ranges, sample_indices
from megatron_sip.data.cut import CutRule, nominal_position, prefix_start, settle_position
from megatron_sip.data.documents import Corpus, inner_eod_message
from megatron_sip.data.index import CutIndex, load_or_build
from megatron_sip.data.order import (
    Purpose,
    count_shared,
    deal_apart,
    epoch_permutation,
    generator,
    rank_share,
    repair_seam,
    slot_batches,
)
from megatron_sip.data.resume import check_same
from megatron_sip.data.tokenizer import Tokenizer
from megatron_sip.errors import ConfigError, DataError
from megatron_sip.types import Cut


class CutStream:
    """The cuts of a corpus, endlessly: each epoch holds every cut once, shuffled by (seed, epoch).

    The stream has no position of its own: the caller says how many samples were consumed, so it can never run
    ahead of what was trained.

    Raises:
        ConfigError: settings that leave nothing to cut.
        DataError: no document is long enough, or the cache folder that was named cannot be used.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, data_config: DataConfig, seed: int, global_batch_size: int
    ) -> None:
        if global_batch_size < 1:
            raise ConfigError(f"--global-batch-size {global_batch_size} must be at least 1")
        self._corpus, self._tokenizer, self._seed = corpus, tokenizer, seed
        self._batch_size = global_batch_size
        self._rule = CutRule.from_config(data_config)
        self._fingerprint = corpus.fingerprint()
        self._index: CutIndex = load_or_build(corpus, self._rule, self._fingerprint, data_config.data_cache_path)
        if self._index.num_cuts == 0:
            reasons = ", ".join(f"{count} {name}" for name, count in self._index.skipped.items() if count)
            raise DataError(
                f"--data-path {' '.join(corpus.prefixes)}: none of {corpus.num_documents} documents can be cut "
                f"({reasons}); a document needs {max(self._rule.needed, self._rule.min_document)} tokens: lower "
                "--min-prefix-length, --suffix-length or --min-document-length, or give longer documents"
            )
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def samples_per_epoch(self) -> int:
        """Cuts of one epoch."""
        return self._index.num_cuts

    def skipped(self) -> dict[str, int]:
        """What one epoch leaves out: documents by reason, and for walk the tokens behind the last whole suffix."""
        return dict(self._index.skipped)

    def epoch_of(self, sample_index: int) -> int:
        """The epoch of a sample."""
        return sample_index // self.samples_per_epoch

    def batch(self, consumed_samples: int, dp_rank: int = 0, dp_size: int = 1, jumped: Ranges = ()) -> list[Cut]:
        """This rank's cuts of the global batch behind `consumed_samples`; the ranks' lists in order are the whole.

        `jumped` samples are never taken, nor counted as consumed.

        Raises:
            ConfigError: the global batch does not divide over `dp_size`.
            DataError: a document holds end-of-document inside.
        """
        share = rank_share(self._batch_size, dp_rank, dp_size)
        indices = sample_indices(consumed_samples, self._batch_size, jumped)
        return [self.cut(indices[place]) for place in share]

    def cut(self, sample_index: int) -> Cut:
        """The cut with this global sample index."""
        epoch, place = divmod(sample_index, self.samples_per_epoch)
        document, ordinal = self._index.locate(int(self._order(epoch)[place]))
        length = self._corpus.length(document)
        uniform = float(generator(self._seed, Purpose.CUT_POSITION, document, epoch).random())
        nominal = nominal_position(length, ordinal, uniform, self._rule)
        position = self._settle(document, nominal, length)
        start = prefix_start(position, self._rule)
        tokens = self._corpus.tokens(document, start, position + self._rule.suffix)
        if bool((tokens == self._corpus.eod).any()):
            raise DataError(inner_eod_message(" ".join(self._corpus.prefixes), document))
        return Cut(sample_index, document, position, tokens[: position - start], tokens[position - start :])

    def _settle(self, document: int, nominal: int, length: int) -> int:
        start = max(0, nominal - 8)
        window = self._corpus.tokens(document, start, min(length, nominal + 8))
        return settle_position(
            nominal, length, self._rule, lambda at: self._tokenizer.is_char_boundary(window, at - start)
        )

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """`[samples_per_epoch]` cut at each place of the epoch; the two last used stay in memory."""
        if epoch not in self._orders:
            order = self._make_order(epoch)
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = order
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._rule.mode == "random":
            return epoch_permutation(self.samples_per_epoch, self._seed, Purpose.EPOCH_ORDER, epoch)
        order = self._deal(epoch)
        phase = self._phase(epoch)
        if epoch == 0 or phase == 0:
            return order
        owner = self._index.owners()
        # With an epoch shorter than a batch several epochs share it: then a repeat is forced anyway.
        taken = owner[self._deal(epoch - 1)[-phase:]]
        return repair_seam(order, owner, taken, phase, self._batch_size)

    def _deal(self, epoch: int) -> npt.NDArray[np.int64]:
        rng = generator(self._seed, Purpose.WALK_ORDER, epoch)
        return deal_apart(self._index.owners(), self._phase(epoch), self._batch_size, rng)

    def _phase(self, epoch: int) -> int:
        """Samples of the epoch's first global batch that belong to epochs before."""
        return epoch * self.samples_per_epoch % self._batch_size

    def forced_shared(self, epoch: int) -> int:
        """Cuts of this epoch that share a global batch with another of their document because the corpus forces it.

        Always 0 in random mode, where a document has one cut an epoch; the seam to the epoch before is counted.
        """
        if self._rule.mode == "random":
            return 0
        owner = self._index.owners()
        phase = min(self._phase(epoch), epoch * self.samples_per_epoch, self.samples_per_epoch)
        before = owner[self._order(epoch - 1)[self.samples_per_epoch - phase :]] if phase else owner[:0]
        here = owner[self._order(epoch)]
        shared = np.concatenate([before, here])
        batch_of = slot_batches(len(shared), self._phase(epoch) - phase, self._batch_size)
        return count_shared(shared, batch_of) - count_shared(before, batch_of[: len(before)])

    def state_dict(self, consumed_samples: int) -> dict[str, Any]:
        """What a resume needs: the position, and what must be unchanged for it to mean the same samples."""
        return {"consumed_samples": consumed_samples, **self._identity()}

    def _identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {
            "kind": "cuts",
            "data_fingerprint": self._fingerprint,
            "seed": self._seed,
            **self._rule.settings(),
        }
        if self._rule.mode == "walk":
            # Only here does the order depend on the batch: cuts of one document are kept out of it.
            identity["global_batch_size"] = self._batch_size
        return identity

    def check_state(self, state: Mapping[str, Any]) -> int:
        """The consumed samples of a saved state.

        Raises:
            DataError: it was saved with other data or other split settings.
        """
        return check_same(state, self._identity())
