"""What a layout pads, and which layouts can share a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sip.checkpoint.convert_layout import padding_mismatch, target_config, target_shape
from megatron_sip.config.groups import Config, ModelConfig, ParallelConfig

SMOLLM2 = ModelConfig(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    vocab_size=49153,
    untie_embeddings_and_output_weights=False,
)


def at(tp_size: int) -> Config:
    return Config(model=SMOLLM2, parallel=ParallelConfig(tensor_model_parallel_size=tp_size))


@pytest.mark.parametrize(
    ("tp_size", "groups", "rows"), [(1, 3, 49280), (2, 4, 49408), (3, 3, 49536), (4, 4, 49664), (6, 6, 49920)]
)
def test_groups_and_vocabulary_are_padded_for_the_layout(tp_size, groups, rows):
    shape = target_shape(SMOLLM2, tp_size, 1)
    assert (shape.groups_padded, shape.vocab_padded) == (groups, rows)
    assert target_config(at(1), tp_size, 2, bf16=True).parallel.pad_query_groups is (tp_size in (2, 4, 6))


@pytest.mark.parametrize(("stored", "wanted"), [(1, 1), (1, 3), (3, 1), (2, 4), (4, 2), (6, 6)])
def test_layouts_that_pad_alike_share_a_checkpoint(stored, wanted):
    assert padding_mismatch(at(stored), at(wanted), Path("runs/x/iter_0000020")) is None


@pytest.mark.parametrize(("stored", "wanted", "numbers"), [(2, 1, (4, 3)), (1, 2, (3, 4)), (4, 6, (4, 6))])
def test_the_others_get_the_command_that_converts(stored, wanted, numbers):
    said = padding_mismatch(at(stored), at(wanted), Path("runs/x/iter_0000020"))
    assert said is not None
    assert f"tensor parallel size {stored} with {numbers[0]} query groups" in said
    assert f"size {wanted} needs {numbers[1]}" in said
    command = "python tools/checkpoint/convert.py --loader mcore --saver mcore --load-dir runs/x --iteration 20 "
    assert said.endswith(f"{command}--save-dir NEW_FOLDER --target-tensor-parallel-size {wanted}")


def test_sequence_parallel_needs_more_than_one_rank():
    config = Config(model=SMOLLM2, parallel=ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True))
    assert not target_config(config, 1, 1, bf16=False).parallel.sequence_parallel
    assert target_config(config, 4, 1, bf16=False).parallel.sequence_parallel
