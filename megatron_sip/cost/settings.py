"""The settings of a run that its cost hangs on, under the trainer's names, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megatron_sip.checkpoint.hf_names import padded_query_groups
from megatron_sip.config.groups import (
    DataConfig,
    ParallelConfig,
    ReferenceConfig,
    RolloutConfig,
    TrainingConfig,
)
from megatron_sip.cost.assumed import assumed, setting
from megatron_sip.cost.flops import StepWork
from megatron_sip.cost.sizes import ModelSizes


@dataclass(frozen=True)
class RunSettings:
    """Layout, batch and method of a run."""

    prefix_length: int = assumed(1024, "mean tokens of a prefix (P)", "ours: half of the paper's 2048")
    suffix_length: int = setting(DataConfig.suffix_length, "tokens of a suffix (S)")
    num_rollouts: int = setting(RolloutConfig.num_rollouts, "rollouts for each prefix (K)")
    global_batch_size: int = setting(256, "prefixes of a step")
    micro_batch_size: int = setting(TrainingConfig.micro_batch_size, "rows of one forward pass of a rank")
    train_iters: int = setting(2000, "steps, where no --token-budget is given")
    token_budget: float | None = setting(None, "tokens of the corpus to be passed, such as 1e12")
    split_mode: Literal["random", "walk"] = setting(
        DataConfig.split_mode, "random: a cut takes prefix and suffix out of the budget; walk: the suffix alone"
    )
    objective: Literal["online-dpo", "rf-nll"] = setting(TrainingConfig.objective, "what is trained")
    train_prefix: bool = setting(False, "next-token term on the prefix (--prefix-ntp-weight above 0)")
    tensor_model_parallel_size: int = setting(ParallelConfig.tensor_model_parallel_size, "TP")
    pipeline_model_parallel_size: int = setting(ParallelConfig.pipeline_model_parallel_size, "PP")
    sequence_parallel: bool = setting(ParallelConfig.sequence_parallel, "norms and residuals split over TP")
    pad_query_groups: bool = setting(ParallelConfig.pad_query_groups, "groups of zeros, where TP does not divide them")
    use_distributed_optimizer: bool = setting(False, "optimizer state split over DP")
    overlap_grad_reduce: bool = setting(ParallelConfig.overlap_grad_reduce, "reduce gradients during backward")
    dtype: Literal["bf16", "fp32"] = setting("bf16", "weights and activations")
    recompute_granularity: Literal["none", "full"] = setting("none", "activation recomputation")
    logits_chunk_mib: int = setting(TrainingConfig.logits_chunk_mib, "MiB of float32 logits at a time in training")
    rollout_batch_size: int | None = setting(None, "prefixes of a rollout wave on a DP rank; none: as many as fit")
    rollout_engine: Literal["megatron", "vllm"] = setting("megatron", "where rollouts are written")
    rollout_gpus: int = setting(0, "further GPUs, of the vllm engine")
    rollout_tensor_parallel_size: int = setting(1, "GPUs that share a model of the vllm engine")
    rollout_pipeline_groups: int | None = setting(
        RolloutConfig.rollout_pipeline_groups, "groups of rows that fill the stages in rollouts; none: as many as PP"
    )
    rollout_cuda_graph: bool | None = setting(
        RolloutConfig.rollout_cuda_graph, "decode by CUDA graphs; none: at TP 1 and PP 1"
    )
    reference_update_interval: int = setting(ReferenceConfig.reference_update_interval, "steps between updates")
    shared_prefix: bool = setting(True, "one row [prefix | chosen | rejected], else a row for each candidate")
    prefill_once: bool = setting(True, "a prefix is prefilled once, and its cache kept once, for its K rollouts")

    @property
    def element_bytes(self) -> int:
        """Bytes of a weight, an activation and a cached number."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one copy of the policy."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def by_graphs(self) -> bool:
        """Whether the trainer decodes by CUDA graphs."""
        return self.model_parallel == 1 if self.rollout_cuda_graph is None else self.rollout_cuda_graph

    @property
    def budget_tokens_per_step(self) -> int:
        """Tokens of the corpus that a step takes out of the budget.

        In walk mode a document's tokens are suffix once each; in random mode a document gives one cut an epoch.
        """
        per_cut = self.suffix_length + (self.prefix_length if self.split_mode == "random" else 0)
        return self.global_batch_size * per_cut

    def work(self) -> StepWork:
        """What a step computes."""
        pairs = self.objective == "online-dpo"
        return StepWork(
            prefix=self.prefix_length,
            suffix=self.suffix_length,
            rollouts=self.num_rollouts,
            batch=self.global_batch_size,
            suffixes=2 if pairs else 1,
            reference=pairs,
            prefix_logits=self.train_prefix,
            prefill_once=self.prefill_once,
            share_prefix=self.shared_prefix,
        )


def as_trained(model: ModelSizes, run: RunSettings) -> ModelSizes:
    """The policy as it is on the GPUs: with the groups of zeros of --pad-query-groups, each of equal heads."""
    groups = padded_query_groups(model.num_query_groups, run.tensor_model_parallel_size)
    heads = groups * model.num_attention_heads // model.num_query_groups
    return replace(model, num_query_groups=groups, num_attention_heads=heads)


def problems(run: RunSettings, model: ModelSizes, gpus: int) -> Iterator[str]:
    """Relations that cannot be, one sentence each, with the flags at fault; single numbers are in their ranges."""
    tp, pp = run.tensor_model_parallel_size, run.pipeline_model_parallel_size
    if gpus % run.model_parallel:
        yield f"--gpus {gpus} is no multiple of TP x PP = {tp} x {pp}; change one of them"
        return
    if pp > model.num_layers:
        yield f"--pipeline-model-parallel-size {pp} is more than the model's {model.num_layers} layers; lower it"
    if tp > model.num_attention_heads:
        yield (
            f"--tensor-model-parallel-size {tp} is more than --num-attention-heads {model.num_attention_heads}, and "
            "some ranks would have no head at all; lower it"
        )
    elif model.num_query_groups % tp and not run.pad_query_groups:
        yield (
            f"--tensor-model-parallel-size {tp} does not divide --num-query-groups {model.num_query_groups}; change it "
            "or add groups of zeros with --pad-query-groups"
        )
    if model.ffn_hidden_size % tp:
        yield f"--tensor-model-parallel-size {tp} does not divide --ffn-hidden-size {model.ffn_hidden_size}; change it"
    rows = gpus // run.model_parallel * run.micro_batch_size
    if run.global_batch_size % rows:
        yield (
            f"--global-batch-size {run.global_batch_size} is no multiple of DP x --micro-batch-size = {rows}; "
            "change one of them"
        )
    if run.sequence_parallel and tp == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size above 1; leave it out or raise that"
    if (run.rollout_engine == "vllm") != (run.rollout_gpus > 0):
        yield "--rollout-engine vllm and --rollout-gpus go together; give both or neither"
    elif run.rollout_gpus % run.rollout_tensor_parallel_size:
        yield f"--rollout-gpus {run.rollout_gpus} is no multiple of --rollout-tensor-parallel-size; change one of them"
