"""The parts of a step as work of the busiest device: operations, bytes and layer calls, in the order of time."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sip.config.stages import largest_stage
from megatron_sip.cost.flops import Flops, step_flops
from megatron_sip.cost.hardware import PartWork
from megatron_sip.cost.memory import is_chunked
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.rollout.stagger import rollout_turns


@dataclass(frozen=True)
class Spread:
    """How rollouts or training are spread over devices. `groups` of rows, or micro-batches, fill the stages in turn."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    groups: int = 1

    @property
    def in_sequence(self) -> float:
        """Time of a pass over that of one stage's whole share: 1 where the stages are never idle, PP for one group."""
        return (self.groups + self.pp - 1) / self.groups

    def of(self, flops: Flops, in_sequence: float | None = None) -> tuple[float, float]:
        """(dense, attention) operations of a pass over all rows, in the sequence of one device."""
        share = (in_sequence or self.in_sequence) / (self.tp * self.pp * self.dp)
        return (flops.linear + flops.head) * share, flops.attention * share


@dataclass(frozen=True)
class StepParts:
    """The four parts that are made of passes through the model. `tokens` are decoded one after the other."""

    prefill: PartWork
    decode: PartWork
    reference: PartWork
    train: PartWork
    tokens: int


def spread_of_training(run: RunSettings, gpus: int) -> Spread:
    """Training and reference: the micro-batches of a DP rank fill the stages (1F1B)."""
    dp = gpus // run.model_parallel
    micro_batches = max(1, run.global_batch_size // (dp * run.micro_batch_size))
    return Spread(run.tensor_model_parallel_size, run.pipeline_model_parallel_size, dp, micro_batches)


def spread_of_rollouts(run: RunSettings, gpus: int, waves: int) -> Spread:
    """Rollouts: on the trainer's GPUs, or on the copies of the model that the vllm engine has.

    The groups are made of whole prefixes, so that a wave has no more groups than prefixes.
    """
    if run.rollout_engine == "vllm":
        tp = run.rollout_tensor_parallel_size
        return Spread(tp=tp, dp=run.rollout_gpus // tp)
    tp, pp = run.tensor_model_parallel_size, run.pipeline_model_parallel_size
    dp = gpus // run.model_parallel
    prefixes = -(-run.global_batch_size // (dp * waves))
    return Spread(tp, pp, dp, min(run.rollout_pipeline_groups or pp, prefixes))


def step_parts(model: ModelSizes, run: RunSettings, gpus: int, waves: int) -> StepParts:
    """What a step asks of the busiest device. `waves` of prefixes are rolled out one after the other."""
    work = run.work()
    flops = step_flops(model, work)
    training, rollouts = spread_of_training(run, gpus), spread_of_rollouts(run, gpus, waves)
    stage = largest_stage(model.num_layers, run.pipeline_model_parallel_size)
    passes = training.groups + training.pp - 1
    forward = training.of(flops.reference if work.reference else Flops())
    trained = training.of(flops.train + _again(model, run, flops.train * (1 / 3)))
    return StepParts(
        prefill=PartWork(*rollouts.of(flops.prefill)),
        decode=_decode(model, run, rollouts, flops.decode, waves) if work.rollouts else PartWork(),
        reference=PartWork(*forward, calls=passes * stage if work.reference else 0),
        train=PartWork(*trained, calls=passes * stage),
        tokens=work.suffix * waves if work.rollouts else 0,
    )


def _again(model: ModelSizes, run: RunSettings, forward: Flops) -> Flops:
    """What the backward pass computes once more of the forward pass: the layers if asked to, the head if in chunks."""
    layers = run.recompute_granularity == "full"
    return Flops(
        linear=forward.linear if layers else 0.0,
        attention=forward.attention if layers else 0.0,
        head=forward.head if is_chunked(model, run) else 0.0,
    )


def _decode(model: ModelSizes, run: RunSettings, spread: Spread, flops: Flops, waves: int) -> PartWork:
    """Every token reads the weights once for all rows of a group, and the keys and values of every row.

    Those of a prefix are read once for its K rows where the engine keeps them once and attends with all rows
    together; vLLM's pages are kept once and read for each row.
    """
    groups, stages = spread.groups, spread.pp
    layers = largest_stage(model.num_layers, stages)
    # Turns of a token, one for each group in a stage; between two blocks of tokens the pipeline empties and fills.
    turns = rollout_turns(stages, groups, run.suffix_length) / run.suffix_length
    # The last stage has the LM head as well. It is the busiest where all are busy; else a round passes it once.
    heads = groups if groups >= stages else 1
    tokens, shares = run.suffix_length * waves, groups * spread.tp * spread.dp
    rows = run.global_batch_size * run.num_rollouts / spread.dp
    once = run.prefill_once and run.rollout_engine == "megatron"
    prefix_reads = rows / run.num_rollouts if once else rows
    cached = prefix_reads * run.prefix_length + rows * (run.suffix_length + 1) / 2
    stage_cache = model.cache_elements_per_token / (spread.tp * stages)
    round_weights = (model.matmul_parameters * turns / stages + model.head_parameters * heads) / spread.tp
    return PartWork(
        dense=(flops.linear * turns / stages + flops.head * heads) / shares,
        attention=flops.attention * turns / stages / shares,
        dense_bytes=run.element_bytes * tokens * round_weights,
        attention_bytes=run.element_bytes * run.suffix_length * cached * stage_cache * turns / groups,
        calls=tokens * turns * layers,
    )
