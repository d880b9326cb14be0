"""Operations of the policy by second and GPU, and their share of the peak, from what a step really computed."""

from __future__ import annotations

from megatron_sip.config.groups import Config
from megatron_sip.cost.done import DoneWork, done_flops, row_work
from megatron_sip.cost.sizes import model_sizes
from megatron_sip.loss.reduce import LossWeights
from megatron_sip.metrics.aggregate import SumCount
from megatron_sip.parallel.world import World
from megatron_sip.types import PreferenceBatch

TFLOPS, MFU = "throughput/tflops_per_gpu", "throughput/mfu"


class Throughput:
    """That of one model-parallel group. The counts are GPU-seconds, so that groups and steps add up to the run's.

    Raises:
        ConfigError: a size of the model is missing.
    """

    def __init__(self, config: Config, world: World) -> None:
        weights = LossWeights.from_config(config)
        self._model = model_sizes(config.model)
        self._gpus = world.tp_size * world.pp_size
        self._peak = config.logging.peak_tflops
        self._copies = 1 if config.training.shared_prefix or not weights.dpo else 2
        self._scores_prefix = weights.ntp > 0
        self._confined = not self._scores_prefix and config.model.recompute_granularity is None
        # A backward pass is twice a forward pass; the reference has none.
        self._passes = 3 + (1 if weights.dpo else 0)

    def metrics(
        self, written: DoneWork, batch: PreferenceBatch, seconds: float, *, trained: bool
    ) -> dict[str, SumCount]:
        """Those of a step that took `seconds` in all, waiting included.

        written  the work of its rollouts
        batch    the rows of this data parallel rank
        trained  whether they went through the model; an update need not have followed
        """
        flops = done_flops(self._model, written).total
        if trained:
            rows = batch.layout().tolist()
            work = row_work(rows, copies=self._copies, with_prefix=self._scores_prefix, confined=self._confined)
            flops += self._passes * done_flops(self._model, work).total
        done, spent = flops / 1e12, seconds * self._gpus
        found = {TFLOPS: (done, spent)}
        return found if self._peak is None else {**found, MFU: (done / self._peak, spent)}
