"""One optimizer step on a batch of preference rows: reference, forward and backward, checks, update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sip.config.groups import Config
from megatron_sip.loss.reduce import GlobalCounts, LossWeights, ObjectiveTerms, local_counts, objective_terms
from megatron_sip.loss.segments import ReferenceLogps, SegmentLogps, of_pairs, segment_sums
from megatron_sip.model.policy import PolicyModel
from megatron_sip.model.reference import ReferencePolicy
from megatron_sip.parallel.regions import region
from megatron_sip.parallel.world import World
from megatron_sip.preference.arrange import ArrangedBatch, arrange
from megatron_sip.preference.layout import ScoredTokens, position_ids, scored_tokens
from megatron_sip.preference.unshared import scored_in_two_rows
from megatron_sip.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_sip.training.spikes import SpikeRule
from megatron_sip.types import PreferenceBatch


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    `skipped` is empty, or why no update was made: "no_pairs", "non_finite", "spike". `metrics` holds (sum, count) by
    name on the last stage's first tensor-parallel rank and is empty elsewhere. `loss` is that of the global batch,
    the same number on all ranks; None where nothing was there to train.
    """

    skipped: str
    grad_norm: float | None
    metrics: dict[str, tuple[float, float]]
    reference_seconds: float
    train_seconds: float
    loss: float | None = None


@dataclass(frozen=True)
class _MicroBatch:
    """Some pairs of the batch, the rows that the model reads, their layout on the host, and where they are scored.

    Tensors are on the device. `rows` are the pairs themselves, or two rows for each (`--no-shared-prefix`), as wide as
    the longest of them. `reference` is None on all stages but the last, and for objectives without one.
    """

    batch: PreferenceBatch
    rows: PreferenceBatch
    layout: torch.Tensor
    scored: ScoredTokens
    reference: ReferenceLogps | None


class PolicyTrainer:
    """The policy with its gradient buffers, optimizer, schedule and reference, on one rank."""

    def __init__(self, policy: PolicyModel, config: Config, world: World) -> None:
        self.policy = policy
        self.config = config
        self.world = world
        self.weights = LossWeights.from_config(config)
        self.ddp = wrap_data_parallel(policy, config)
        self.optimizer = build_optimizer(self.ddp, config)
        self.scheduler = build_scheduler(self.optimizer, config)
        self.reference = ReferencePolicy(policy, config.reference) if self.weights.dpo else None
        self.spikes = SpikeRule.from_config(config.training)
        self.recent_losses: tuple[float, ...] = ()
        """Losses of the last accepted steps, oldest first, by which the next one is judged."""
        self.before_pass: Callable[[], None] = lambda: None
        """Called by all ranks together; where it raises on all, the step leaves nothing behind."""
        self.before_micro_batch: Callable[[], None] = lambda: None
        """Called within a pass; without pipeline parallel it may raise likewise."""

    def after_weights_changed(self) -> None:
        """Bring fp32 main weights and reference in line with weights that were just loaded into the policy."""
        self.optimizer.reload_model_params()
        if self.reference:
            self.reference.copy_policy()

    @property
    def shares_prefix(self) -> bool:
        """Whether a pair is one row; that of an objective without a rejected suffix always is."""
        return self.config.training.shared_prefix or not self.weights.dpo

    @property
    def learning_rate(self) -> float:
        """The rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def expect_batch(self) -> None:
        """A batch is soon to be trained: what that needs may come meanwhile."""
        if self.reference:
            self.reference.come()

    def step(
        self, batch: PreferenceBatch, updating: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> StepResult:
        """Train on this data parallel rank's rows. All ranks call it together, with or without valid rows.

        `updating` is entered around the update; where it raises on all ranks, the step leaves nothing behind.

        An update is made only if the global batch has something to train, its loss and every gradient are finite and
        the loss is no spike; otherwise neither optimizer nor schedule nor reference moves (Adam moves on zero
        gradients).
        """
        counts = self._global_counts(batch)
        if counts.of(self.weights.primary) == 0:
            if self.reference:
                self.reference.stay()
            return StepResult("no_pairs", None, {}, 0.0, 0.0)
        started, arranged = time.perf_counter(), self.arrange(batch)
        with region("reference"):
            reference = self.reference_logps(arranged) if self.reference else None
        middle = time.perf_counter()
        with region("forward_backward"):
            metrics = self.forward_backward(arranged, reference, counts)
        finite, loss = self._outcome(metrics)
        skipped = "" if finite else "non_finite"
        if finite and self.spikes.is_spike(self.recent_losses, loss):
            skipped = "spike"
        if skipped:
            return StepResult(skipped, None, metrics, middle - started, time.perf_counter() - middle, loss)
        with updating():
            self.recent_losses = self.spikes.remember(self.recent_losses, loss)
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)
            if self.reference:
                self.reference.after_optimizer_step()
        norm = None if grad_norm is None else float(grad_norm)
        return StepResult("", norm, metrics, middle - started, time.perf_counter() - middle, loss)

    def arrange(self, batch: PreferenceBatch) -> ArrangedBatch:
        """The rows that the model reads of this rank's pairs, in micro-batches."""
        multiple = self.world.tp_size if self.config.parallel.sequence_parallel else 1
        return arrange(batch, self.config.training.micro_batch_size, multiple, shares_prefix=self.shares_prefix)

    def forward_backward(
        self, batch: ArrangedBatch, reference: ReferenceLogps | None, counts: GlobalCounts
    ) -> dict[str, tuple[float, float]]:
        """Fill the gradient buffers with the gradient of the global batch's loss; returns local metric sums."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts: list[ObjectiveTerms] = self._run(batch, self._loss(counts), reference, forward_only=False)
        if not parts or self.world.tp_rank:
            return {}
        total = torch.stack([part.metrics for part in parts]).sum(0).tolist()
        return {
            **{name: (row[0], row[1]) for name, row in zip(parts[0].names, total, strict=True)},
            "tokens/padding_share": batch.padding(),
        }

    def segment_logps(self, batch: ArrangedBatch) -> SegmentLogps | None:
        """Summed log-probabilities of every row's segments under the current weights, on the last stage.

        Returns:
            Pairs in the order of the batch; None on the other stages.
        """

        def collect(logps: torch.Tensor, micro: _MicroBatch, **_schedule: Any) -> SegmentLogps:
            return self._sums(logps, micro)

        parts: list[SegmentLogps] = self._run(batch, collect, None, forward_only=True)
        if not parts:
            return None
        back = batch.places().to(parts[0].chosen.device)
        return SegmentLogps(
            chosen=torch.cat([part.chosen for part in parts])[back],
            rejected=torch.cat([part.rejected for part in parts])[back],
            prefix=torch.cat([part.prefix for part in parts])[back],
        )

    def reference_logps(self, batch: ArrangedBatch) -> ReferenceLogps | None:
        """The same under the reference weights."""
        if self.reference is None:
            raise ValueError("this objective has no reference policy")
        with self.reference.in_place_of_policy():
            logps = self.segment_logps(batch)
        return None if logps is None else ReferenceLogps(logps.chosen, logps.rejected)

    def _sums(self, logps: torch.Tensor, micro: _MicroBatch) -> SegmentLogps:
        sums = segment_sums(logps, micro.scored, micro.rows.rows)
        return sums if self.shares_prefix else of_pairs(sums)

    def _loss(self, counts: GlobalCounts) -> Callable[..., Any]:
        """The objective as megatron-core's schedules call it: summed loss, count, metrics."""

        def loss(
            logps: torch.Tensor, micro: _MicroBatch, **_schedule: Any
        ) -> tuple[torch.Tensor, torch.Tensor, ObjectiveTerms]:
            terms = objective_terms(
                self._sums(logps, micro),
                micro.reference,
                micro.batch,
                weights=self.weights,
                counts=counts,
                beta=self.config.preference.beta,
                length_normalization=self.config.preference.length_normalization,
            )
            return terms.loss.float(), terms.count, terms

        return loss

    def _run(
        self,
        batch: ArrangedBatch,
        on_logps: Callable[..., Any],
        reference: ReferenceLogps | None,
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Send the micro-batches through megatron-core's schedule; what `on_logps` left, last stage only."""

        def forward_step(micros: Iterator[_MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            self.before_micro_batch()
            micro = next(micros)
            positions = position_ids(micro.layout, micro.rows.width).to(self.world.device)
            scored = micro.scored
            places = (scored.row, scored.source)
            out = model(micro.rows.tokens, positions, micro.layout, places, targets=scored.target)
            return out, lambda logps, **schedule: on_logps(logps, micro, **schedule)

        self.before_pass()
        # Stages that send hidden states of several widths tell each other which comes next; one width is known.
        self.policy.config.variable_seq_lengths = len(batch.widths) > 1
        with torch.set_grad_enabled(not forward_only):
            return get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=self._micro_batches(batch, reference),
                model=[self.ddp],
                num_microbatches=len(batch.micros),
                seq_length=max(batch.widths),
                micro_batch_size=len(batch.micros[0].pairs) * batch.each,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )

    def _micro_batches(self, batch: ArrangedBatch, reference: ReferenceLogps | None) -> Iterator[_MicroBatch]:
        device, score = self.world.device, scored_tokens if self.shares_prefix else scored_in_two_rows
        for micro, read in batch.split():
            scored = score(read, with_prefix=self.weights.ntp > 0)
            own = None if reference is None else reference.take(micro.pairs)
            pairs = batch.pairs.take(micro.pairs).to(device)
            yield _MicroBatch(pairs, read.to(device), read.layout(), scored.to(device), own)

    def _global_counts(self, batch: PreferenceBatch) -> GlobalCounts:
        """Valid pairs and trained tokens of the whole global batch."""
        counts = local_counts(batch).to(self.world.device)
        dist.all_reduce(counts, group=self.world.dp_group)
        return GlobalCounts.from_tensor(counts)

    def _outcome(self, metrics: dict[str, tuple[float, float]]) -> tuple[bool, float]:
        """Whether every rank's reduced gradients and the loss are finite, and the global batch's loss.

        `metrics` are this rank's own. The answer is the same on all ranks: one reduction of three numbers.
        """
        buffers = self.ddp.buffers + self.ddp.expert_parallel_buffers
        # The largest magnitude carries any inf and nan along and needs no mask as large as the buffer.
        largest = [torch.linalg.vector_norm(buffer.grad_data, float("inf")) for buffer in buffers]
        finite = bool(torch.stack(largest).isfinite().all())
        sums = torch.tensor([0.0 if finite else 1.0, *metrics.get("loss", (0.0, 0.0))], dtype=torch.float64)
        dist.all_reduce(sums, group=self.world.control_group)
        bad_ranks, total, count = sums.tolist()
        loss = total / count if count else math.nan
        return bad_ranks == 0 and math.isfinite(loss), loss
