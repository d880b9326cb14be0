"""The operations that are counted of a step are those of its products, as torch counts them while they run.

Torch counts matrix products, not the attention of this machine's kernels; that is counted by hand in the unit tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import oracle
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_sip.config.groups import Config
from megatron_sip.cost.done import DoneWork, done_flops, row_work
from megatron_sip.cost.sizes import model_sizes
from megatron_sip.rollout.engine import Sampling
from megatron_sip.types import PreferenceBatch


def products_of(run: Callable[[], Any]) -> float:
    """Operations in the products of two matrices."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    return float(sum(count for name, count in counts.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm)))


class OperationsCheck:
    """The policy of the oracle in one process, with nothing padded: each row has a pass of its own."""

    def __init__(self, trainer: Any, config: Config, batch: PreferenceBatch, indices: list[int]) -> None:
        assert trainer.world.size == 1
        self.trainer, self.config, self.batch, self.indices = trainer, config, batch, indices
        # Padded columns of the vocabulary are multiplied too.
        self.model = replace(model_sizes(config.model), vocab_size=len(trainer.policy.head_weight))

    def same(self, run: Callable[[], Any], work: DoneWork, passes: int) -> None:
        counted = done_flops(self.model, work)
        found, wanted = products_of(run), passes * (counted.linear + counted.head)
        assert found == wanted, f"{found:,.0f} operations, {wanted:,.0f} are counted"

    def step(self) -> None:
        """Reference and training, with a shared prefix, and as two rows a pair, which are of one width here."""
        trainer, layout = self.trainer, self.batch.layout().tolist()
        equal = [row for row, (_, chosen, rejected) in enumerate(layout) if chosen == rejected]
        for shared, batch in ((True, self.batch), (False, self.batch.take(equal))):
            training = replace(self.config.training, micro_batch_size=1, shared_prefix=shared)
            trainer.config = replace(self.config, training=training)
            rows, copies = batch.layout().tolist(), 1 if shared else 2
            work = row_work(rows, copies=copies, with_prefix=False, confined=True)
            arranged = trainer.arrange(batch)
            reference, counts = trainer.reference_logps(arranged), trainer._global_counts(batch)
            self.same(partial(trainer.reference_logps, arranged), work, 1)
            self.same(partial(trainer.forward_backward, arranged, reference, counts), work, 3)
        trainer.config = self.config

    def rollouts(self) -> None:
        """Waves of one prefix, by megatron-core's layers, whose products torch sees."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        prefixes = [torch.tensor(oracle.pairs()[index][0]).numpy() for index in self.indices]
        sampling = Sampling(2, oracle.NEW_TOKENS, 0.0, 1.0, eod=0, stop_at_eod=False, seed=3)
        engine = MegatronEngine(self.trainer.policy, self.trainer.world, WaveLimits(prefixes=1))
        engine.bypasses = False
        work = engine.generate(prefixes, self.indices, sampling).work
        self.same(partial(engine.generate, prefixes, self.indices, sampling), work, 1)
