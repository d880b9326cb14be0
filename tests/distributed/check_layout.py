"""One layout against the oracle: log-probabilities, loss, every gradient, three mutations, greedy and sampled tokens.

torchrun check_layout.py FOLDER TP PP SP MICRO_BATCH SAMPLES_FILE [bf16]

With bf16 the bounds are those of the format: it has 8 bits of mantissa.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import oracle
from rollout_memory import MemoryCheck

from megatron_sip.checkpoint.hf import load_hf_weights
from megatron_sip.checkpoint.hf_config import model_config_from_hf
from megatron_sip.config.groups import Config, ParallelConfig, PreferenceConfig, TrainingConfig
from megatron_sip.errors import ConfigError
from megatron_sip.loss.segments import ReferenceLogps
from megatron_sip.parallel import world as world_module
from megatron_sip.preference.micro_batches import MicroRows
from megatron_sip.rollout.engine import Sampling
from megatron_sip.rollout.sampling import uniforms
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


class CountedCalls:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.calls = 0

    def __call__(self, *positional: Any) -> Any:
        self.calls += 1
        return self.function(*positional)


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

        tokens = self.trainer._run(self.batch, collect, None, forward_only=True)
        logps = self.trainer.segment_logps(self.batch)
        if logps is not None:
            order = [pair for micro in self.trainer._split(self.batch)[1] for pair in micro.pairs]
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
        self.metrics = self.trainer.forward_backward(batch, reference, counts)
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
        reference = self.trainer.reference_logps(self.batch)
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

    def rollouts(self, samples_file: Path) -> None:
        """Greedy equals transformers; sampled tokens equal those of the first layout that wrote the file."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        prefixes = [torch.tensor(oracle.pairs()[index][0]).numpy() for index in self.indices]
        engine = MegatronEngine(self.policy, self.world, WaveLimits(prefixes=3))
        greedy = Sampling(2, oracle.NEW_TOKENS, 0.0, 1.0, eod=0, stop_at_eod=False, seed=3)
        tokens = engine.generate(prefixes, self.indices, greedy).tokens
        wanted = self.expected["greedy"][self.indices]
        for k in range(2):
            assert torch.equal(tokens[:, k], wanted), (tokens[:, k], wanted)
        sampled = replace(greedy, num_rollouts=3, temperature=1.0, top_p=0.9)
        rollouts = engine.generate(prefixes, self.indices, sampled)
        assert int(rollouts.tokens.max()) < oracle.VOCAB
        assert not (rollouts.tokens == 0).any(), "end-of-document was sampled"
        if self.world.size == 1:
            torch.save(rollouts.tokens, samples_file)
            ending = engine.generate(prefixes, self.indices, replace(sampled, temperature=5.0, eod=7, stop_at_eod=True))
            stop = (ending.tokens == 7).any(-1)
            assert torch.equal(ending.lengths[~stop], torch.full_like(ending.lengths[~stop], oracle.NEW_TOKENS))
            self.ends(prefixes, sampled)
        else:
            self.same_samples(rollouts.tokens, torch.load(samples_file)[self.indices], sampled)
        assert engine.bypasses != self.policy.config.sequence_parallel
        engine.bypasses = False  # megatron-core runs the layers
        self.same_samples(engine.generate(prefixes, self.indices, sampled).tokens, rollouts.tokens, sampled)
        if self.world.pp_size > 1:
            self.groups(prefixes, sampled, rollouts.tokens)
        self.graphs(prefixes, sampled, rollouts.tokens)

    def graphs(self, prefixes: list[np.ndarray], sampled: Sampling, wanted: torch.Tensor) -> None:
        """The same tokens by CUDA graphs, in two waves; a rank without a GPU refuses them."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        limits = WaveLimits(prefixes=5)
        if self.world.device.type != "cuda":
            with pytest.raises(ConfigError, match="--rollout-cuda-graph needs a GPU"):
                MegatronEngine(self.policy, self.world, limits, cuda_graph=True)
            return
        engine = MegatronEngine(self.policy, self.world, limits, cuda_graph=True)
        self.same_samples(engine.generate(prefixes, self.indices, sampled).tokens, wanted, sampled)
        if self.world.is_main:
            print("CUDA graphs draw the same tokens", flush=True)

    def groups(self, prefixes: list[np.ndarray], sampled: Sampling, wanted: torch.Tensor) -> None:
        """The tokens do not hang on how many groups pass the stages, nor on which of them end early."""
        from megatron_sip.rollout.megatron import MegatronEngine
        from megatron_sip.rollout.wave_plan import WaveLimits

        # Blocks of 5 tokens: the last one is shorter. As many groups as stages, a number that does not divide the
        # prefixes, one each, and more than there are.
        for groups, wave in ((1, None), (None, None), (3, None), (8, None), (11, 5)):
            meetings: list[None] = []
            meet = partial(meetings.append, None)
            engine = MegatronEngine(self.policy, self.world, WaveLimits(wave), meet, groups, block=5)
            self.same_samples(engine.generate(prefixes, self.indices, sampled).tokens, wanted, sampled)
            waves = -(-len(prefixes) // (wave or len(prefixes)))
            assert len(meetings) == waves * -(-oracle.NEW_TOKENS // 5), "every rank meets the others equally often"
        self.ends(prefixes, sampled)

    def ends(self, prefixes: list[np.ndarray], sampled: Sampling) -> None:
        """All rows of the first prefix end with their fourth token; where it is a group, no further block has it."""
        from megatron_sip.rollout.megatron import MegatronEngine

        fourth = int(self.expected["greedy"][self.indices[0], 3])
        greedy = replace(sampled, temperature=0.0, eod=fourth)
        found = []
        for groups in (1, len(prefixes)):
            engine = MegatronEngine(self.policy, self.world, groups=groups, block=5)
            written = CountedCalls(engine._decode)
            engine._decode = written  # type: ignore[method-assign]
            found.append(engine.generate(prefixes, self.indices, replace(greedy, stop_at_eod=True)))
            ended = found[-1].lengths.amax(1).view(groups, -1).amax(1)
            # A group goes on to the end of the block of its last token; its first token needs no decoding.
            wanted = sum(min(oracle.NEW_TOKENS, 5 * -(-int(length) // 5)) - 1 for length in ended)
            assert written.calls == wanted, (written.calls, wanted, ended)
        one, each = found
        assert torch.equal(one.tokens, each.tokens)
        assert torch.equal(one.lengths, each.lengths)
        assert int(one.lengths[0].max()) <= 4
        assert int(one.lengths.max()) == oracle.NEW_TOKENS, "another group goes on"

    def spread_vocabulary(self) -> None:
        """Tokens that TP ranks draw together are those of one rank with all columns, and the same on each."""
        from megatron_sip.rollout.sampling import sample_tokens

        rows, columns, rank = 600, 150, self.world.tp_rank
        generator = torch.Generator().manual_seed(11)
        whole = 3 * torch.randn(rows, columns * self.world.tp_size, generator=generator)
        whole[:50, :columns] = -torch.inf  # no mass on the first rank
        whole[50:100, -columns:] = -torch.inf  # nor on the last
        whole[100:150] = whole[100:150].round()  # many equals
        whole[150:200] *= 1000.0
        draws = torch.rand(rows, generator=generator, dtype=torch.float64)
        draws[::20], draws[1::20] = 0.0, 1 - 2.0**-53
        own = whole[:, rank * columns : (rank + 1) * columns].to(self.world.device)
        for temperature, top_p in ((1.0, 1.0), (0.4, 1.0), (0.0, 1.0), (1.0, 0.8)):
            tokens = sample_tokens(own, draws.to(own.device), temperature, top_p, self.world.tp_group).cpu()
            differing = tokens != sample_tokens(whole, draws, temperature, top_p)
            if temperature:
                steps = torch.softmax(whole.double() / temperature, dim=1).cumsum(1)
                distance = (steps - draws[:, None]).abs().amin(1)[differing]
                assert not distance.numel() or float(distance.max()) < 1e-6
                # A draw at the end may fall on either of tokens that have hardly any mass.
                differing = differing & (draws > 0) & (draws < 1 - 1e-12)
            assert int(differing.sum()) <= (1 if temperature else 0)
            least, most = tokens.clone(), tokens.clone()
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.world.control_group)
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.world.control_group)
            assert torch.equal(least, most)

    def same_samples(self, tokens: torch.Tensor, wanted: torch.Tensor, sampling: Sampling) -> None:
        """Equal to those of one process, except where a first difference lies at a boundary (architecture.md)."""
        differing = [place for place in np.ndindex(*tokens.shape[:2]) if not torch.equal(tokens[place], wanted[place])]
        for row, k in differing:
            first = int((tokens[row, k] != wanted[row, k]).nonzero()[0])
            ids = [*oracle.pairs()[self.indices[row]][0], *wanted[row, k, :first].tolist()]
            draw = float(uniforms(sampling.seed, self.indices[row], k, first + 1)[first])
            distance = oracle.boundary_distance(self.folder / "policy", ids, draw, sampling.top_p)
            assert distance < 1e-4, (
                f"pair {self.indices[row]}, rollout {k}, token {first}: differs, {distance:.1e} away"
            )
        if self.world.is_main:
            print(f"sampled rows that differ at a boundary: {len(differing)} of {wanted[..., 0].numel()}", flush=True)

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
            self.trainer._split = partial(self.one_width, size)
            wanted, wanted_sums, wanted_metrics = self.trained()
            del self.trainer._split
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
        reference = self.trainer.reference_logps(self.batch)
        right = self.gradients(self.batch, reference)
        size = self.trainer.config.training.micro_batch_size
        assert right < self.gradient_limit, f"micro-batch {size}: a gradient is {right:.1e} of its norm away"
        gradients = [parameter.main_grad.clone() for parameter in self.policy.parameters()]
        return gradients, {} if reference is None else vars(reference), dict(self.metrics)

    def one_width(self, size: int, batch: PreferenceBatch) -> tuple[PreferenceBatch, tuple[MicroRows, ...]]:
        """Micro-batches of neighbours in the batch, as wide as its longest row."""
        starts = range(0, batch.rows, size)
        return batch, tuple(MicroRows(tuple(range(start, start + size)), batch.width) for start in starts)

    def unshared(self) -> None:
        """Two rows a pair give the same log-probabilities and the same gradient as one row does."""
        reference = self.trainer.reference_logps(self.batch)
        shared = self.gradients(self.batch, reference), self.loss
        kept = [p.main_grad.clone() for p in self.policy.parameters()]
        self.trainer.config = replace(self.config, training=replace(self.config.training, shared_prefix=False))
        self.logprobs()
        again = self.trainer.reference_logps(self.batch)
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
        right = self.gradients(self.batch, self.trainer.reference_logps(self.batch))
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
        reference = trainer.reference_logps(self.batch)

        def gradients() -> list[torch.Tensor]:
            trainer.forward_backward(self.batch, reference, trainer._global_counts(self.batch))
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
        check.rollouts(Path(samples))
        check.spread_vocabulary()
        memory = MemoryCheck(check.config, check.world)
        memory.predictions()
        memory.waves()
    # Behind the rollouts, as in a real step: what they leave behind must not disturb training.
    check.logprobs()
    check.step()
    check.micro_batches()
    check.unshared()
    check.chunks()
    check.tied()
    check.skips_non_finite()
    print(f"rank {check.world.rank}: passed", flush=True)
    world_module.stop()


if __name__ == "__main__":
    main()
