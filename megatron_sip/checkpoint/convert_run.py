"""One conversion from beginning to end: read piece by piece, written beside the target, renamed when it is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megatron_sip.checkpoint.convert_find import find_checkpoint, run_config_of
from megatron_sip.checkpoint.convert_layout import target_config, target_shape
from megatron_sip.checkpoint.convert_source import McoreSource, one_type, open_hf
from megatron_sip.checkpoint.convert_state import TrainingState, has_training_state, training_state
from megatron_sip.checkpoint.convert_to_hf import Beside, write_hf
from megatron_sip.checkpoint.convert_to_mcore import write_mcore
from megatron_sip.checkpoint.hf_config import config_in_type, hf_config_from_model
from megatron_sip.checkpoint.hf_names import LlamaShape
from megatron_sip.checkpoint.hf_tokenizer import HF_FILES, TOKENIZER_FILES, special_ids
from megatron_sip.checkpoint.safetensors_io import DEFAULT_SHARD_BYTES, require_absent
from megatron_sip.checkpoint.stream_read import StoredTensors
from megatron_sip.config.groups import Config, DataConfig, ParallelConfig
from megatron_sip.errors import CheckpointError
from megatron_sip.services.journal import FOLDER as JOURNAL

Format = Literal["hf", "mcore"]


def silent(*_said: object) -> None:
    """Hears and says nothing."""


@dataclass(frozen=True)
class Conversion:
    """What is converted into what. None leaves a setting as the source has it.

    load_dir, save_dir  a Hugging Face folder, or one that --save of a run writes (`iter_...` inside)
    iteration           of the checkpoint that is read; default the newest whole one
    tensor_parallel     layout that a written checkpoint is padded and cut for; default the source's, 1 for a
    pipeline_parallel   Hugging Face folder
    dtype               of the written weights
    tokenizer           folder whose tokenizer goes with the weights; default the source's
    weights_only        make a checkpoint of iteration 0 that holds the policy alone, as out of a Hugging Face folder
    max_shard_bytes     largest safetensors file
    """

    loader: Format
    saver: Format
    load_dir: Path
    save_dir: Path
    iteration: int | None = None
    tensor_parallel: int | None = None
    pipeline_parallel: int | None = None
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    weights_only: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


def convert(
    job: Conversion, progress: Callable[[int, int], None] = silent, say: Callable[[str], None] = silent
) -> None:
    """Convert a model, in one process. Memory holds a tensor or two of it, however large it is.

    progress  hears of the bytes that are written and of all that will be
    say       hears what the user should know, a sentence a time

    Raises:
        CheckpointError: the source is missing, damaged or no model that the policy can be; the target exists or
            cannot be written; or a setting means nothing here. Nothing is at `job.save_dir` then.
        ConfigError: the run_config.yaml of a checkpoint cannot be read.
    """
    idle = [f"{flag} means nothing without {needs}" for flag, needs in _idle_flags(job)]
    if idle:
        raise CheckpointError("; ".join(idle))
    require_absent(job.save_dir)
    (_from_hf if job.loader == "hf" else _from_mcore)(job, progress, say)


def _idle_flags(job: Conversion) -> Iterator[tuple[str, str]]:
    """Flags that could do nothing, and what each needs: they were meant for something else."""
    if job.iteration is not None and job.loader == "hf":
        yield "--iteration", "--loader mcore"
    if job.tensor_parallel is not None and job.saver == "hf":
        yield "--target-tensor-parallel-size", "--saver mcore"
    if job.pipeline_parallel is not None and job.saver == "hf":
        yield "--target-pipeline-parallel-size", "--saver mcore"
    if job.weights_only and "hf" in (job.loader, job.saver):
        yield "--weights-only", "--loader mcore --saver mcore"


def _from_hf(job: Conversion, progress: Callable[[int, int], None], say: Callable[[str], None]) -> None:
    with open_hf(job.load_dir) as (model, source):
        dtype = job.dtype or one_type(source, job.load_dir)
        tokenizer = job.tokenizer
        if tokenizer is None and (job.load_dir / "tokenizer.json").is_file():
            tokenizer = job.load_dir
        if job.saver == "hf":
            beside = Beside(config_in_type(job.load_dir, dtype), job.load_dir, HF_FILES)
            write_hf(job.save_dir, source, beside, dtype, progress, job.max_shard_bytes)
            return
        name = None if tokenizer is None else str(tokenizer.resolve())
        config, shape = _target(job, Config(model=model, data=DataConfig(tokenizer_model=name)), dtype, say)
        write_mcore(job.save_dir, source, shape, config, dtype, progress)


def _from_mcore(job: Conversion, progress: Callable[[int, int], None], say: Callable[[str], None]) -> None:
    folder, iteration = find_checkpoint(job.load_dir, job.iteration, say)
    config, stored = run_config_of(folder), StoredTensors(folder)
    source = McoreSource(stored, config.model)
    dtype = job.dtype or one_type(source, folder)
    say(f"reading iteration {iteration} of {job.load_dir}")
    if job.saver == "hf":
        tokenizer = job.tokenizer or (Path(config.data.tokenizer_model) if config.data.tokenizer_model else None)
        written = hf_config_from_model(config.model, dtype, special_ids(tokenizer, config.model))
        beside = Beside(written, tokenizer, TOKENIZER_FILES)
        if source.shape.hidden_size % source.shape.num_attention_heads:
            say("WARNING: transformers 5 loads no model whose attention heads do not divide its hidden size")
        write_hf(job.save_dir, source, beside, dtype, progress, job.max_shard_bytes)
        return
    target, shape = _target(job, config, dtype, say)
    state: TrainingState | None = None
    if not job.weights_only:
        if source.dtypes() != {dtype} and has_training_state(stored):
            raise CheckpointError(
                f"{folder} also holds the state of the optimizer or the reference, which belongs to the weights' type; "
                "say --weights-only to convert the policy alone, or leave --dtype out"
            )
        tp_size = target.parallel.tensor_model_parallel_size
        state = training_state(stored, iteration, source, config.model, shape, tp_size)
        if (job.load_dir / JOURNAL).is_dir():
            say(
                f"the journal of verdicts and rewrites stays behind; copy {job.load_dir / JOURNAL} into {job.save_dir} "
                f"for a run that shall repeat the steps behind iteration {iteration} with the same ones"
            )
    write_mcore(job.save_dir, source, shape, target, dtype, progress, state)


def _target(
    job: Conversion, config: Config, dtype: torch.dtype, say: Callable[[str], None]
) -> tuple[Config, LlamaShape]:
    """Settings and shape of the written checkpoint.

    Raises:
        CheckpointError: a layout that no run can have, or a type in which no run trains.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise CheckpointError(f"{job.load_dir} holds {dtype} weights; a run has bf16 or fp32 ones, so choose --dtype")
    own: ParallelConfig = config.parallel
    tp_size = own.tensor_model_parallel_size if job.tensor_parallel is None else job.tensor_parallel
    pp_size = own.pipeline_model_parallel_size if job.pipeline_parallel is None else job.pipeline_parallel
    shape = target_shape(config.model, tp_size, pp_size)
    if shape.groups_padded != shape.num_query_groups:
        say(
            f"tensor parallel size {tp_size} does not divide the {shape.num_query_groups} query groups: "
            f"{shape.groups_padded - shape.num_query_groups} of zeros are added, and only layouts that pad alike "
            "(--pad-query-groups) can load this checkpoint"
        )
    return target_config(config, tp_size, pp_size, bf16=dtype is torch.bfloat16), shape
