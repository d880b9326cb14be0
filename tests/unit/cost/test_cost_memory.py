"""Memory of a GPU against sums by hand and against what a backward pass of the policy's layer keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from plan_case import LLAMA3_8B, LLAMA_1B4

from megatron_sip.cost.memory import (
    layer_activation_bytes,
    memory_per_gpu,
    rollout_shape,
    rollout_sizes,
    stage_parameters,
)
from megatron_sip.cost.settings import RunSettings
from megatron_sip.cost.sizes import ModelSizes
from megatron_sip.rollout.wave_memory import wave_bytes

RUN = RunSettings()
ROOM = 72e9


def test_weights_gradients_and_optimizer_are_those_of_the_table() -> None:
    """docs/scaling.md: 18 bytes a parameter with bf16, 16 in fp32; 8.0e9 parameters at TP 8 give 18 GB a GPU."""
    eight = replace(RUN, tensor_model_parallel_size=8)
    memory = memory_per_gpu(LLAMA3_8B, eight, 8, ROOM)
    assert memory.static == pytest.approx(18 * LLAMA3_8B.parameters / 8, rel=1e-4)
    assert memory.static == pytest.approx(18e9, rel=0.01)
    assert memory.host_reference == pytest.approx(4 * LLAMA3_8B.parameters / 8, rel=1e-4)
    single = memory_per_gpu(LLAMA3_8B, replace(eight, dtype="fp32"), 8, ROOM)
    assert single.static == pytest.approx(16 * LLAMA3_8B.parameters / 8, rel=1e-4)


def test_the_distributed_optimizer_splits_its_state_alone() -> None:
    whole = memory_per_gpu(LLAMA_1B4, RUN, 64, ROOM)
    split = memory_per_gpu(LLAMA_1B4, replace(RUN, use_distributed_optimizer=True), 64, ROOM)
    assert split.optimizer == whole.optimizer / 64
    assert split.weights + split.gradients == whole.weights + whole.gradients


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_stages_hold_their_layers_and_one_vocabulary_matrix(stages: int) -> None:
    one = stage_parameters(LLAMA_1B4, RUN)
    assert one + LLAMA_1B4.hidden_size == LLAMA_1B4.parameters
    part = stage_parameters(LLAMA_1B4, replace(RUN, pipeline_model_parallel_size=stages))
    assert part - LLAMA_1B4.head_parameters == pytest.approx((one - 2 * LLAMA_1B4.head_parameters) / stages)


def cached(run: RunSettings, model: ModelSizes = LLAMA3_8B) -> int:
    """Keys and values of a prefix and its rows."""
    found = wave_bytes(rollout_sizes(model, run), rollout_shape(run), 1)
    return found.prefixes + found.rows


def test_a_cache_is_layers_times_groups_times_width() -> None:
    tokens = 1024 + 16 * 128
    assert cached(RUN) == 2 * 32 * 8 * 128 * tokens * 2
    assert cached(replace(RUN, prefill_once=False)) == 2 * 32 * 8 * 128 * 16 * (1024 + 128) * 2
    split = replace(RUN, tensor_model_parallel_size=4, pipeline_model_parallel_size=2)
    assert cached(split) == cached(RUN) / 8


def test_a_wave_is_what_fits_or_what_is_given() -> None:
    memory = memory_per_gpu(LLAMA_1B4, RUN, 1, ROOM)
    assert 1 < memory.wave < 256
    assert memory.static + memory.rollouts.peak <= ROOM
    # One wave less would not fit.
    larger = -(-256 // (-(-256 // memory.wave) - 1))
    assert memory.static + wave_bytes(rollout_sizes(LLAMA_1B4, RUN), rollout_shape(RUN), larger).peak > ROOM
    assert memory_per_gpu(LLAMA_1B4, replace(RUN, rollout_batch_size=2), 1, ROOM).wave == 2
    assert memory_per_gpu(LLAMA_1B4, RUN, 64, ROOM).wave == 4, "no more than a rank has"


def test_long_prefixes_with_one_rollout_need_most_while_they_are_read() -> None:
    one = replace(RUN, num_rollouts=1, prefix_length=1900, suffix_length=16)
    memory = memory_per_gpu(LLAMA_1B4, one, 1, ROOM)
    found = memory.rollouts
    assert found.prefill > found.rows + found.step
    assert memory.peak == memory.static + found.peak == memory.static + found.prefixes + found.drawn + found.prefill
    assert memory.peak <= ROOM
    many = memory_per_gpu(LLAMA_1B4, RUN, 1, ROOM).rollouts
    assert many.prefill < many.rows + many.step


def test_rollout_servers_hold_the_weights_and_the_rows_of_a_step() -> None:
    served = replace(RUN, rollout_engine="vllm", rollout_gpus=16, rollout_tensor_parallel_size=2)
    memory = memory_per_gpu(LLAMA_1B4, served, 64, ROOM)
    assert memory.server_weights == 2 * LLAMA_1B4.parameters / 2
    # 8 copies of the policy, each with its eighth of the prefixes on 2 GPUs.
    assert memory.server_cache == 256 / 8 * cached(RUN, LLAMA_1B4) / 2
    assert memory.rollouts.peak == 0
    assert memory_per_gpu(LLAMA_1B4, RUN, 64, ROOM).server_weights == 0


def test_recomputation_keeps_the_inputs_of_layers() -> None:
    whole = memory_per_gpu(LLAMA_1B4, RUN, 64, ROOM).activations
    again = memory_per_gpu(LLAMA_1B4, replace(RUN, recompute_granularity="full"), 64, ROOM).activations
    tokens, layer = 1024 + 256, layer_activation_bytes(LLAMA_1B4, RUN)
    assert whole == tokens * 24 * layer
    assert again == tokens * (24 * 2 * 2048 + layer)


def test_logits_are_those_of_a_micro_batch_and_at_most_a_chunk() -> None:
    def logits(**changes: object) -> float:
        return memory_per_gpu(LLAMA3_8B, replace(RUN, **changes), 64, ROOM).logits

    suffixes = 256 * 128_256 * 4  # 128,256 is a multiple of 128: no padding
    assert logits(dtype="fp32") == suffixes
    assert logits() == suffixes * 1.5
    assert logits(tensor_model_parallel_size=2, micro_batch_size=4) == 2 * suffixes * 1.5
    assert logits(train_prefix=True, dtype="fp32") == 256 * 2**20
    assert logits(train_prefix=True, dtype="fp32", logits_chunk_mib=32) == 32 * 2**20


def test_tensor_and_sequence_parallel_split_a_layer() -> None:
    one = layer_activation_bytes(LLAMA_1B4, RUN)
    tensor = replace(RUN, tensor_model_parallel_size=4)
    whole = 2 * 4 * LLAMA_1B4.hidden_size
    assert layer_activation_bytes(LLAMA_1B4, tensor) == whole + (one - whole) / 4
    assert layer_activation_bytes(LLAMA_1B4, replace(tensor, sequence_parallel=True)) == one / 4


def test_a_layer_keeps_what_autograd_keeps() -> None:
    """A layer written out as the policy's, on a row [prefix | chosen | rejected]; weights do not count."""
    model = ModelSizes(1, 64, 160, 8, 2, 8, 128, untied=True)
    prefix, suffix = 512, 16
    x = torch.randn(prefix + 2 * suffix, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float32 and tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    shapes = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "o": (64, 64), "gate": (160, 64), "up": (160, 64)}
    w = {name: torch.randn(shape, requires_grad=True) for name, shape in (shapes | {"down": (64, 160)}).items()}
    norm = torch.ones(64, requires_grad=True)
    weights = {tensor.data_ptr() for tensor in (*w.values(), norm)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = F.rms_norm(x, (64,), norm)
        q, k, v = (
            F.linear(h, w[name]).view(len(x), heads, 8).transpose(0, 1)[None]
            for name, heads in (("q", 8), ("k", 2), ("v", 2))
        )
        front = prefix + suffix
        first = F.scaled_dot_product_attention(q[:, :, :front], k[:, :, :front], v[:, :, :front], enable_gqa=True)
        keys, values = (torch.cat([t[:, :, :prefix], t[:, :, front:]], dim=2) for t in (k, v))
        second = F.scaled_dot_product_attention(q[:, :, front:], keys, values, enable_gqa=True)
        attended = torch.cat([first, second], dim=2)[0].transpose(0, 1).reshape(len(x), 64)
        y = x + F.linear(attended, w["o"])
        h = F.rms_norm(y, (64,), norm)
        out = y + F.linear(F.silu(F.linear(h, w["gate"])) * F.linear(h, w["up"]), w["down"])
    assert out.requires_grad
    predicted = layer_activation_bytes(model, replace(RUN, dtype="fp32")) * len(x)
    assert sum(kept.values()) == pytest.approx(predicted, rel=0.12)
