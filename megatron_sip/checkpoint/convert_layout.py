"""The layout that a converted checkpoint is cut and padded for, and whether two layouts pad alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_sip.checkpoint.hf_names import LlamaShape, llama_shape, padded_query_groups, padded_vocab_size
from megatron_sip.checkpoint.hf_tensors import check_divisible
from megatron_sip.checkpoint.latest import iteration_of
from megatron_sip.config.groups import Config, ModelConfig
from megatron_sip.errors import CheckpointError


def target_shape(model: ModelConfig, tp_size: int, pp_size: int) -> LlamaShape:
    """The model as a run at this layout holds it: query groups and vocabulary padded.

    Raises:
        CheckpointError: no run can have this layout; the flag is named.
    """
    shape = llama_shape(model)
    for flag, value in (("tensor", tp_size), ("pipeline", pp_size)):
        if value < 1:
            raise CheckpointError(f"--target-{flag}-parallel-size is {value}; it must be at least 1")
    if tp_size > shape.num_attention_heads:
        raise CheckpointError(
            f"--target-tensor-parallel-size {tp_size} is more than the model's {shape.num_attention_heads} attention "
            "heads, and some ranks would have none"
        )
    if pp_size > shape.num_layers:
        raise CheckpointError(
            f"--target-pipeline-parallel-size {pp_size} is more than the model's {shape.num_layers} layers"
        )
    shape = shape.with_padding(
        padded_query_groups(shape.num_query_groups, tp_size),
        padded_vocab_size(shape.vocab_size, model.make_vocab_size_divisible_by, tp_size),
    )
    check_divisible(shape, tp_size)
    return shape


def target_config(config: Config, tp_size: int, pp_size: int, *, bf16: bool) -> Config:
    """The settings of a run at this layout and type; all else stays."""
    groups = llama_shape(config.model).num_query_groups
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        pad_query_groups=config.parallel.pad_query_groups if groups % tp_size == 0 else True,
        sequence_parallel=config.parallel.sequence_parallel and tp_size > 1,
    )
    return replace(config, parallel=parallel, training=replace(config.training, bf16=bf16))


def padding_mismatch(stored: Config, wanted: Config, folder: Path) -> str | None:
    """Why a run cannot load a checkpoint whose query groups are padded otherwise, and the command that mends it.

    stored  the settings of the checkpoint's run_config.yaml
    wanted  those of the run that loads it; both with a resolved model, the same in both
    folder  the checkpoint's own folder, in that of --load
    """
    groups = llama_shape(wanted.model).num_query_groups
    at, ours = (config.parallel.tensor_model_parallel_size for config in (stored, wanted))
    has, needs = padded_query_groups(groups, at), padded_query_groups(groups, ours)
    if has == needs:
        return None
    return (
        f"--load {folder} was written at tensor parallel size {at} with {has} query groups, of which the model has "
        f"{groups}; size {ours} needs {needs}. Convert it: "
        "python tools/checkpoint/convert.py "
        f"--loader mcore --saver mcore --load-dir {folder.parent} "
        f"--iteration {iteration_of(folder)} --save-dir NEW_FOLDER --target-tensor-parallel-size {ours}"
    )
