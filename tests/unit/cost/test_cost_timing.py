"""Seconds of a step: bounds by arithmetic and by memory, pipeline stages, and what only moves data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from plan_case import LLAMA3_8B, LLAMA_1B4, PAPER

from megatron_sip.checkpoint.hf_names import padded_vocab_size
from megatron_sip.cost.flops import step_flops
from megatron_sip.cost.hardware import Cluster, Efficiency, PartRate, PartWork
from megatron_sip.cost.memory import is_chunked, memory_per_gpu
from megatron_sip.cost.parts import step_parts
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.timing import PolicySeconds, policy_seconds
from megatron_sip.model.lm_head import VocabularyPart

RUN = RunSettings()
FREE = Efficiency(
    layer_overhead_us=0,
    eager_layer_overhead_us=0,
    server_layer_overhead_us=0,
    tp_latency_us=0,
    token_overhead_us=0,
)


def seconds(run: RunSettings, cluster: Cluster, efficiency: Efficiency = FREE) -> PolicySeconds:
    memory = memory_per_gpu(LLAMA_1B4, run, cluster.gpus // run.model_parallel, 72e9)
    return policy_seconds(LLAMA_1B4, run, cluster, efficiency, memory)


def test_a_part_is_bound_by_the_slower_of_arithmetic_and_memory() -> None:
    work = PartWork(dense=10, attention=4, dense_bytes=3, attention_bytes=9, calls=2)
    assert PartRate(dense=5, attention=4, bandwidth=3, call_seconds=0.5).seconds(work) == 2 + 3 + 1
    assert PartRate(dense=5, attention=4).seconds(work) == 2 + 1


def test_training_reaches_its_share_of_the_peak() -> None:
    found = seconds(RUN, PAPER.cluster)
    flops = step_flops(LLAMA_1B4, RUN.work())
    assert found.train == pytest.approx(flops.train.total / (64 * 989e12 * 0.37))
    assert found.reference == pytest.approx(flops.reference.total / (64 * 989e12 * 0.37))
    assert found.prefill == pytest.approx(flops.prefill.total / (64 * 989e12 * 0.37))


def test_full_recomputation_costs_a_forward_pass_of_the_layers() -> None:
    flops = step_flops(LLAMA_1B4, RUN.work()).train
    found = seconds(replace(RUN, recompute_granularity="full"), PAPER.cluster).train
    operations = 4 / 3 * (flops.linear + flops.attention) + flops.head
    assert found == pytest.approx(operations / (64 * 989e12 * 0.37))


def test_logits_in_chunks_are_made_again_in_the_backward_pass() -> None:
    """A pair has 256 scored positions of 32,000 columns in fp32, which is 31.25 MiB."""
    flops = step_flops(LLAMA_1B4, RUN.work())
    whole, chunked = (step_parts(LLAMA_1B4, replace(RUN, logits_chunk_mib=mib), 64, 1) for mib in (32, 31))
    assert whole.train.dense == pytest.approx((flops.train.linear + flops.train.head) / 64)
    assert chunked.train.dense == pytest.approx((flops.train.linear + 4 / 3 * flops.train.head) / 64)
    assert chunked.train.attention == whole.train.attention
    assert chunked.reference == whole.reference, "without gradients nothing is made again"


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}, {"train_prefix": True}, {"objective": "rf-nll"}])
def test_logits_are_in_chunks_where_the_trainer_has_them_so(tp: int, changes: dict[str, Any]) -> None:
    run = replace(RUN, tensor_model_parallel_size=tp, **changes)
    work = run.work()
    positions = run.micro_batch_size * (work.suffixes * 128 + (1023 if run.train_prefix else 0))
    columns = padded_vocab_size(32_000, 128, tp) // tp
    for mib in range(1, 200):
        part = VocabularyPart(0, 32_000, mib * 2**20, group=None)  # type: ignore[arg-type]
        chunks = part.chunks(positions, columns)
        assert is_chunked(LLAMA_1B4, replace(run, logits_chunk_mib=mib)) == (len(chunks) > 1), mib


def test_decoding_of_few_rows_reads_the_weights_once_a_token() -> None:
    few = replace(RUN, num_rollouts=1, global_batch_size=64, prefix_length=1)
    found = seconds(few, PAPER.cluster)
    weights = 2 * (LLAMA_1B4.matmul_parameters + LLAMA_1B4.head_parameters)
    assert found.decode == pytest.approx(128 * weights / (3.35e12 * 0.6), rel=0.02)
    twice = seconds(replace(few, num_rollouts=2), PAPER.cluster)
    assert twice.decode < 1.02 * found.decode, "a second row rides along"


def test_decoding_of_many_rows_is_bound_by_arithmetic() -> None:
    many = replace(RUN, num_rollouts=16, global_batch_size=64 * 256, prefix_length=1)
    parts = step_parts(LLAMA_1B4, many, 64, waves=1)
    assert parts.decode.dense / (989e12 * 0.4) > parts.decode.dense_bytes / (3.35e12 * 0.6)


def test_a_prefix_is_read_once_for_its_rollouts_by_our_engine_and_for_each_by_vllm() -> None:
    mine = step_parts(LLAMA_1B4, RUN, 64, waves=1).decode.attention_bytes
    server = replace(RUN, rollout_engine="vllm", rollout_gpus=64)
    theirs = step_parts(LLAMA_1B4, server, 64, waves=1).decode.attention_bytes
    own = 16 * (128 + 1) / 2
    assert theirs / mine == pytest.approx((16 * 1024 + own) / (1024 + own))


def test_waves_read_the_weights_again() -> None:
    one, two = (step_parts(LLAMA_1B4, RUN, 64, waves=waves) for waves in (1, 2))
    assert two.decode.dense_bytes == 2 * one.decode.dense_bytes
    assert two.decode.dense == one.decode.dense
    assert two.tokens == 2 * one.tokens


def test_one_group_leaves_the_other_stages_idle_and_several_fill_them() -> None:
    flat = step_parts(LLAMA_1B4, RUN, 16, waves=1)
    staged = replace(RUN, pipeline_model_parallel_size=4)
    idle = step_parts(LLAMA_1B4, replace(staged, rollout_pipeline_groups=1), 64, waves=1)
    assert idle.decode.dense == pytest.approx(flat.decode.dense), "four times the GPUs, the same time"
    assert idle.decode.dense_bytes == flat.decode.dense_bytes, "each weight is read once a token, the head's too"
    filled = step_parts(LLAMA_1B4, staged, 64, waves=1)
    head = step_flops(LLAMA_1B4, RUN.work()).decode.head / 16
    # A block of 16 tokens of 4 groups takes 64 turns and 3 at its ends; all groups are prefilled once in 7 turns.
    assert filled.decode.dense == pytest.approx((flat.decode.dense - head) / 4 * 67 / 64 + head)
    assert filled.decode.attention == pytest.approx(flat.decode.attention / 4 * 67 / 64)
    assert filled.decode.attention_bytes == pytest.approx(flat.decode.attention_bytes / 4 * 67 / 64)
    assert filled.prefill.dense == pytest.approx(flat.prefill.dense / 4 * 7 / 4)
    assert filled.decode.calls / idle.decode.calls == pytest.approx(67 / 64)
    waves = step_parts(LLAMA_1B4, staged, 64, waves=16)
    assert waves.decode.dense == pytest.approx(flat.decode.dense), "a wave of one prefix is one group"


def makespan(groups: int, stages: int, tokens: int, middle: float, last: float) -> float:
    """When the last group's last token of a block leaves the last stage, which serve one group at a time, in order."""
    free, back = [0.0] * stages, [0.0] * groups
    for _ in range(tokens):
        for group in range(groups):
            for stage in range(stages):
                begun = max(back[group], free[stage])
                back[group] = free[stage] = begun + (last if stage == stages - 1 else middle)
    return max(back)


@pytest.mark.parametrize(("groups", "stages"), [(1, 1), (1, 4), (2, 4), (4, 4), (8, 4), (3, 2)])
def test_decoding_in_groups_takes_as_long_as_when_it_is_played_through(groups: int, stages: int) -> None:
    run = replace(
        RUN, pipeline_model_parallel_size=stages, rollout_pipeline_groups=groups, global_batch_size=256 * groups
    )
    parts = step_parts(LLAMA_1B4, run, 16 * stages, waves=1)
    rows = run.global_batch_size * 16 / 16 / groups
    middle = 2 * LLAMA_1B4.matmul_parameters / stages * rows
    last = middle + 2 * LLAMA_1B4.head_parameters * rows
    # 128 tokens are 8 blocks, and the pipeline fills once a block.
    assert parts.decode.dense == pytest.approx(8 * makespan(groups, stages, 16, middle, last), rel=0.03)


def test_the_bubble_of_1f1b() -> None:
    staged = replace(RUN, pipeline_model_parallel_size=4)
    parts = step_parts(LLAMA_1B4, staged, 16, waves=1)
    micro_batches = 256 // 4
    flat = step_parts(LLAMA_1B4, RUN, 16, waves=1)
    assert parts.train.dense / flat.train.dense == pytest.approx((micro_batches + 3) / micro_batches)


def test_what_moves_data_only() -> None:
    found = seconds(RUN, PAPER.cluster)
    bytes_fp32 = 4 * LLAMA_1B4.parameters
    assert found.gradient_reduce == pytest.approx(2 * bytes_fp32 * 63 / 64 / 50e9, rel=1e-3)
    assert found.reference_swap == pytest.approx(bytes_fp32 / 50e9, rel=1e-3)
    assert found.reference_update == pytest.approx(found.reference_swap * 2 / 10)
    assert found.optimizer == pytest.approx(34 * LLAMA_1B4.parameters / (3.35e12 * 0.23), rel=1e-3)
    hidden = seconds(replace(RUN, overlap_grad_reduce=True), PAPER.cluster).gradient_reduce
    assert 0 < hidden < found.gradient_reduce
    pushed = seconds(replace(RUN, rollout_engine="vllm", rollout_gpus=8), PAPER.cluster)
    # bf16, written by one rank and read by the servers (docs/rollouts.md), however many GPUs these have.
    assert pushed.weight_push == pytest.approx(2 * 2 * LLAMA_1B4.parameters / 2e9)
    assert found.weight_push == 0


def test_nll_has_no_reference() -> None:
    found = seconds(replace(RUN, objective="rf-nll"), PAPER.cluster)
    assert (found.reference, found.reference_swap, found.reference_update) == (0, 0, 0)


def test_the_parts_sum_to_the_whole_and_each_overhead_is_counted() -> None:
    base = seconds(RUN, PAPER.cluster)
    assert base.total == pytest.approx(sum(vars(base).values()))
    slow = seconds(RUN, PAPER.cluster, replace(FREE, layer_overhead_us=10, token_overhead_us=100, row_padding=1.5))
    assert slow.decode - base.decode == pytest.approx(128 * (24 * 10e-6 + 100e-6))
    assert slow.train == pytest.approx(1.5 * base.train)
    server = {"rollout_engine": "vllm", "rollout_gpus": 8}
    for run, name in (
        (RUN, "layer_overhead_us"),
        (replace(RUN, rollout_cuda_graph=False), "eager_layer_overhead_us"),
        (replace(RUN, tensor_model_parallel_size=2), "eager_layer_overhead_us"),
        (replace(RUN, tensor_model_parallel_size=2, rollout_cuda_graph=True), "layer_overhead_us"),
        (replace(RUN, **server), "server_layer_overhead_us"),
    ):
        longer = seconds(run, PAPER.cluster, replace(FREE, **{name: 10})).decode - seconds(run, PAPER.cluster).decode
        assert longer == pytest.approx(128 * 24 * 10e-6), name
    tensor = replace(RUN, tensor_model_parallel_size=8)
    with_latency = replace(FREE, tp_latency_us=5)
    difference = seconds(tensor, PAPER.cluster, with_latency).decode - seconds(tensor, PAPER.cluster).decode
    assert difference == pytest.approx(128 * 24 * 2 * 5e-6)


def test_a_large_model_on_more_gpus_is_faster() -> None:
    tensor = replace(RUN, tensor_model_parallel_size=8)
    memory = memory_per_gpu(LLAMA3_8B, tensor, 8, 72e9)
    some = policy_seconds(LLAMA3_8B, tensor, Cluster(gpus=64), Efficiency(), memory)
    more = policy_seconds(LLAMA3_8B, tensor, Cluster(gpus=256), Efficiency(), memory)
    assert more.total < some.total
