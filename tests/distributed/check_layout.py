"""One layout against the oracle: log-probabilities, loss, every gradient, three mutations, and its rollouts.

torchrun check_layout.py FOLDER TP PP SP MICRO_BATCH SAMPLES_FILE [bf16]

With bf16 the bounds are those of the format: it has 8 bits of mantissa.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from layout_operations import OperationsCheck
from layout_rollouts import RolloutCheck
from rollout_memory import MemoryCheck

from megatron_sip.checkpoint.hf import load_hf_weights
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.config.groups import Config, ParallelConfig, PreferenceConfig, TrainingConfig
from megatron_sip.loss.segments import ReferenceLogps
from megatron_sip.parallel import world as world_module
from megatron_sip.preference.arrange import ArrangedBatch
from megatron_sip.preference.micro_batches import MicroRows
from megatron_sip.types import PreferenceBatch

CHUNK_BYTES = 4 * 50 * 100
"""A hundred columns for the suffixes of three or four pairs: several chunks on every rank, the last one smaller."""


def batch_of(indices: list[int], multiple: int) -> PreferenceBatch:
    """Rows of the oracle's pairs, padded to a common width."""
    rows = [oracle.pairs()[index] for index in indices]
    longest = max(sum(len(part) for part in row) for row in rows)
    width = -(-longest // multiple) * multiple
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for place, row in enumerate(rows):
        flat = torch.tensor([token for part in row for token in part])
        tokens[place, : len(flat)] = flat
    lengths = torch.tensor([[len(part) for part in row] for row in rows])
    return PreferenceBatch(
        tokens=tokens,
        prefix_length=lengths[:, 0],
        chosen_length=lengths[:, 1],
        rejected_length=lengths[:, 2],
        valid=torch.tensor([0.0 if index in oracle.INVALID else 1.0 for index in indices]),
        sample_index=torch.tensor(indices),
    )


def one_width(size: int, batch: PreferenceBatch) -> ArrangedBatch:
    """Micro-batches of neighbours in the batch, as wide as its longest row."""
    starts = range(0, batch.rows, size)
    micros = tuple(MicroRows(tuple(range(start, start + size)), batch.width) for start in starts)
    return ArrangedBatch(batch, batch, micros)


class LayoutCheck:
    """The policy of the oracle at the layout of this launch."""

    def __init__(self, folder: Path, tp: int, pp: int, sequence_parallel: bool, micro: int, bf16: bool) -> None:
        self.folder, self.bf16 = folder, bf16
        self.token_limit, self.gradient_limit = (0.3, 0.25) if bf16 else (1e-5, 1e-5)
        config = Config(
            model=model_config_from_hf(folder / "policy"),
            parallel=ParallelConfig(
                tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=sequence_parallel
            ),
            training=TrainingConfig(micro_batch_size=micro, global_batch_size=len(oracle.PAIRS), bf16=bf16),
            preference=PreferenceConfig(beta=oracle.BETA),
        )
        self.config = config
        self.world = world_module.start(config)
        from megatron_sip.model.build import build_policy, first_layer
        from megatron_sip.training.step import PolicyTrainer

        self.policy = build_policy(config, self.world)
        self.first_layer = first_layer(self.policy)
        self.load("policy", dict(self.policy.named_parameters()))
        self.trainer = PolicyTrainer(self.policy, config, self.world)
        self.arrange = self.trainer.arrange
        self.load("reference", self.trainer.reference.tensors)
        self.multiple = tp if sequence_parallel else 1
        size = len(oracle.PAIRS) // self.world.dp_size
        self.indices = list(range(self.world.dp_rank * size, (self.world.dp_rank + 1) * size))
        self.batch = batch_of(self.indices, self.multiple)
        self.expected = torch.load(folder / "expected.pt")

    def load(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Fill this rank's tensors from one of the oracle's folders."""
        load_hf_weights(
            self.folder / name,
            tensors,
            self.config.model,
            tp_rank=self.world.tp_rank,
            tp_size=self.world.tp_size,
            first_layer=self.first_layer,
        )

    def logprobs(self) -> None:
        """Every suffix token of every row, valid or not, and the sums by row."""

        def collect(logps: torch.Tensor, micro: Any, **_schedule: Any) -> torch.Tensor:
            return logps

        arranged = self.arrange(self.batch)
        tokens = self.trainer._run(arranged, collect, None, forward_only=True)
        logps = self.trainer.segment_logps(arranged)
        if logps is not None:
            order = [pair for micro in arranged.micros for pair in micro.pairs]
            wanted = [self.expected["tokens"][self.indices[pair]] for pair in order]
            torch.testing.assert_close(
                torch.cat(tokens).double().cpu(), torch.cat(wanted), atol=self.token_limit, rtol=0
            )
            sums = torch.stack([logps.chosen, logps.rejected], dim=1).cpu()
            limit = self.token_limit * self.batch.layout()[:, 1:]
            assert bool(((sums - self.expected["logps"][self.indices]).abs() <= limit).all())

    def gradients(self, batch: PreferenceBatch, reference: ReferenceLogps | None) -> float:
        """Largest distance of a gradient tensor from the oracle's, relative to that tensor's norm; over all ranks."""
        counts = self.trainer._global_counts(batch)
        self.metrics = self.trainer.forward_backward(self.arrange(batch), reference, counts)
        self.loss = self.metrics["loss"][0] if self.metrics else 0.0
        wanted = {name: torch.empty_like(p) for name, p in self.policy.named_parameters()}
        self.load("gradient", wanted)
        worst = max(
            float((p.main_grad - wanted[name].float()).norm() / wanted[name].float().norm())
            for name, p in self.policy.named_parameters()
        )
        return self.over_ranks(worst, dist.ReduceOp.MAX)

    def over_ranks(self, value: float, operation: dist.ReduceOp) -> float:
        """A number reduced over all ranks."""
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, op=operation, group=self.world.control_group)
        return float(box)

    def step(self) -> None:
        """Loss and gradients, and that they notice a wrong computation."""
        reference = self.trainer.reference_logps(self.arrange(self.batch))
        right = self.gradients(self.batch, reference)
        total = self.over_ranks(self.loss, dist.ReduceOp.SUM)
        valid = len(oracle.PAIRS) - len(oracle.INVALID)
        found, wanted = total / valid, float(self.expected["loss"])
        assert abs(found - wanted) < self.gradient_limit, f"loss {found}, not {wanted}"
        assert right < self.gradient_limit, f"a gradient is {right:.1e} of its norm away"
        swapped = replace(self.batch, tokens=self.swapped_tokens())
        dropped = reference and ReferenceLogps(0 * reference.chosen, 0 * reference.rejected)
        shifted = replace(
            self.batch, prefix_length=self.batch.prefix_length + 1, chosen_length=self.batch.chosen_length - 1
        )
        for what, batch, ref in (
            ("chosen and rejected swapped", swapped, reference),
            ("reference dropped", self.batch, dropped),
            ("labels shifted", shifted, reference),
        ):
            wrong = self.gradients(batch, ref)
            assert wrong > 100 * self.gradient_limit or wrong > 5 * right, (
                f"{what}: the check did not notice ({wrong:.1e})"
            )
        if self.world.is_main:
            print(f"gradients within {right:.1e}, loss {found:.6f}", flush=True)

    def swapped_tokens(self) -> torch.Tensor:
        """The batch's tokens with both suffixes exchanged where their lengths agree, reversed elsewhere."""
        tokens = self.batch.tokens.clone()
        for row, (p, c, r) in enumerate(self.batch.layout().tolist()):
            own = self.batch.tokens[row, p : p + c + r]
            tokens[row, p : p + c + r] = torch.cat([own[c:], own[:c]]) if c == r else own.flip(0)
        return tokens

    def skips_non_finite(self) -> None:
        """A weight that is not a number on one rank stops the update on every rank, and nothing moves."""
        from megatron_sip.training.optimizer import build_scheduler

        before = [parameter.detach().clone() for parameter in self.policy.parameters()]
        steps, reference = self.trainer.scheduler.num_steps, self.trainer.reference.optimizer_steps
        poisoned = next(iter(self.policy.decoder.layers[0].mlp.parameters()))
        if self.world.rank == self.world.size - 1:
            poisoned.data[0, 0] = float("nan")
        result = self.trainer.step(self.batch)
        assert result.skipped == "non_finite", result
        assert (self.trainer.scheduler.num_steps, self.trainer.reference.optimizer_steps) == (steps, reference)
        poisoned.data.copy_(before[[id(p) for p in self.policy.parameters()].index(id(poisoned))])
        for parameter, old in zip(self.policy.parameters(), before, strict=True):
            assert torch.equal(parameter, old)
        nothing = replace(self.batch, valid=torch.zeros_like(self.batch.valid))
        assert self.trainer.step(nothing).skipped == "no_pairs"
        # A schedule without warm-up has a rate from the first step, so that the next update must move the weights.
        self.trainer.scheduler = build_scheduler(self.trainer.optimizer, self.config)
        assert self.trainer.step(self.batch).skipped == ""
        moved = max(float((p - old).abs().max()) for p, old in zip(self.policy.parameters(), before, strict=True))
        assert moved > 0
        assert self.trainer.reference.optimizer_steps == reference + 1

    def micro_batches(self) -> None:
        """The same whatever the micro-batch size, and as with the rows in their order, all of one width."""
        same = self.gradient_limit if self.bf16 else 1e-6
        for size in (1, 2, 4):
            if self.batch.rows % size:
                continue
            self.trainer.config = replace(self.config, training=replace(self.config.training, micro_batch_size=size))
            found, sums, metrics = self.trained()
            self.arrange = partial(one_width, size)
            wanted, wanted_sums, wanted_metrics = self.trained()
            self.arrange = self.trainer.arrange
            assert sums.keys() == wanted_sums.keys()
            for name, value in sums.items():
                torch.testing.assert_close(value, wanted_sums[name], atol=100 * same, rtol=same)
            worst = max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))
            assert worst < same, f"micro-batch {size}: a gradient is {worst:.1e} of that of one width away"
            assert metrics.keys() == wanted_metrics.keys()
            padded, before = (values.pop("tokens/padding_share", (0, 1))[0] for values in (metrics, wanted_metrics))
            assert padded < before or not metrics or size == self.batch.rows
            for name, pair in metrics.items():
                assert pair == pytest.approx(wanted_metrics[name], rel=same, abs=same), name
        self.trainer.config = self.config

    def trained(self) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], dict[str, tuple[float, float]]]:
        """Gradients (checked against the oracle's), the reference's sums by row, and metrics."""
        reference = self.trainer.reference_logps(self.arrange(self.batch))
        right = self.gradients(self.batch, reference)
        size = self.trainer.config.training.micro_batch_size
        assert right < self.gradient_limit, f"micro-batch {size}: a gradient is {right:.1e} of its norm away"
        gradients = [parameter.main_grad.clone() for parameter in self.policy.parameters()]
        return gradients, {} if reference is None else vars(reference), dict(self.metrics)

    def unshared(self) -> None:
        """Two rows a pair give the same log-probabilities and the same gradient as one row does."""
        reference = self.trainer.reference_logps(self.arrange(self.batch))
        shared = self.gradients(self.batch, reference), self.loss
        kept = [p.main_grad.clone() for p in self.policy.parameters()]
        self.trainer.config = replace(self.config, training=replace(self.config.training, shared_prefix=False))
        self.logprobs()
        again = self.trainer.reference_logps(self.arrange(self.batch))
        own = self.gradients(self.batch, again), self.loss
        worst = max(
            float((p.main_grad - old).norm() / old.norm())
            for p, old in zip(self.policy.parameters(), kept, strict=True)
        )
        self.trainer.config = self.config
        assert own[0] < self.gradient_limit, f"two rows a pair: a gradient is {own[0]:.1e} of its norm away"
        assert abs(own[1] - shared[1]) < self.gradient_limit
        assert worst < self.gradient_limit, f"one row and two rows a pair: gradients differ by {worst:.1e} of the norm"

    def chunks(self) -> None:
        """The LM head by chunks of the vocabulary: the oracle's numbers, and no logits beside the chunks."""
        whole, self.policy.logits_chunk_bytes = self.policy.logits_chunk_bytes, CHUNK_BYTES
        self.policy.logits = _no_logits
        self.logprobs()
        right = self.gradients(self.batch, self.trainer.reference_logps(self.arrange(self.batch)))
        assert right < self.gradient_limit, f"by chunks of the vocabulary a gradient is {right:.1e} of its norm away"
        del self.policy.logits
        self.policy.logits_chunk_bytes = whole

    def tied(self) -> None:
        """With the embedding as LM head, and the prefix scored too: the gradients of megatron-core's own loss."""
        from megatron_sip.model.build import build_policy
        from megatron_sip.training.step import PolicyTrainer

        config = replace(
            self.config,
            model=replace(self.config.model, untie_embeddings_and_output_weights=False, init_method_std=0.2),
            preference=replace(self.config.preference, nll_weight=0.2, prefix_ntp_weight=0.3),
        )
        policy = build_policy(config, self.world)
        trainer = PolicyTrainer(policy, config, self.world)
        arranged = trainer.arrange(self.batch)
        reference = trainer.reference_logps(arranged)

        def gradients() -> list[torch.Tensor]:
            trainer.forward_backward(arranged, reference, trainer._global_counts(self.batch))
            return [parameter.main_grad.clone() for parameter in policy.parameters()]

        policy.logprobs = partial(_megatron_logprobs, policy)
        wanted = gradients()
        del policy.logprobs
        for size in (policy.logits_chunk_bytes, CHUNK_BYTES):
            policy.logits_chunk_bytes = size
            pairs = zip(gradients(), wanted, strict=True)
            worst = max(float((own - other).norm() / other.norm()) for own, other in pairs)
            assert worst < self.gradient_limit, f"tied, {size} bytes of logits: a gradient is {worst:.1e} away"


def _no_logits(hidden: torch.Tensor) -> torch.Tensor:
    raise AssertionError("training made all logits")


def _megatron_logprobs(policy: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`PolicyModel.logprobs` by megatron-core's column-parallel product and vocabulary-parallel loss."""
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

    return -vocab_parallel_cross_entropy(policy.logits(hidden).unsqueeze(1), targets.unsqueeze(1)).squeeze(1)


def main() -> None:
    folder, tp, pp, sequence_parallel, micro, samples, *precision = sys.argv[1:]
    bf16 = precision == ["bf16"]
    check = LayoutCheck(Path(folder), int(tp), int(pp), sequence_parallel == "1", int(micro), bf16)
    if not bf16:  # in bf16 a greedy choice may fall on either side of a near tie
        rollouts = RolloutCheck(check.policy, check.world, check.folder, check.indices)
        rollouts.tokens(Path(samples))
        rollouts.spread_vocabulary()
    memory = MemoryCheck(check.config, check.world)
    if not bf16 or check.world.device.type == "cuda":  # a CPU computes parts of bf16 attention in fp32
        memory.predictions()
    if not bf16:
        memory.waves()
    # Behind the rollouts, as in a real step: what they leave behind must not disturb training.
    check.logprobs()
    check.step()
    check.micro_batches()
    check.unshared()
    check.chunks()
    check.tied()
    if check.world.size == 1 and check.world.device.type == "cpu":  # torch sees no products of Transformer Engine
        operations = OperationsCheck(check.trainer, check.config, check.batch, check.indices)
        operations.rollouts()
        operations.step()
    check.skips_non_finite()
    print(f"rank {check.world.rank}: passed", flush=True)
    world_module.stop()


if __name__ == "__main__":
    main()
