"""Relations between settings, checked before any process group, server or model exists.

Each check is a generator of sentences that name the flags at fault and the way out; all that is wrong is told
at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sip.config.groups import CheckpointConfig, Config, ModelConfig
from megatron_sip.config.presets import require_sizes, with_preset
from megatron_sip.config.ranges import out_of_range
from megatron_sip.config.stages import largest_stage
from megatron_sip.config.timeouts import stage_timeouts
from megatron_sip.config.validate_profile import profile_problems
from megatron_sip.errors import ConfigError


def validate(config: Config, world_size: int) -> None:
    """Check the settings against each other and against the number of ranks that were launched.

    Sizes of the model that are not known yet (they come with a checkpoint's folder) are not checked; call it
    again with the resolved configuration.

    Raises:
        ConfigError: everything that is wrong, with the flags at fault.
    """
    _raise(list(out_of_range(config)))
    model = with_preset(config.model)
    if config.checkpoint.load is None:
        require_sizes(model)
    problems = [*_layout(config, world_size), *_model(config, model), *_batch(config, world_size)]
    problems += [*_schedule(config), *_lengths(config, model), *_folders(config), *_timeouts(config)]
    problems += profile_problems(config, world_size)
    if config.training.objective != "ntp":
        from megatron_sip.config.validate_preference import preference_problems
        from megatron_sip.config.validate_rollout import rollout_problems

        problems += [*preference_problems(config), *rollout_problems(config)]
    _raise(problems)


def notes(config: Config) -> tuple[str, ...]:
    """What is allowed but costs something, for the log; `config.model` as far as it is known."""
    model, tp = with_preset(config.model), config.parallel.tensor_model_parallel_size
    groups = model.num_query_groups
    if groups is None or groups % tp == 0:
        return ()
    padded = -(-groups // tp) * tp
    return (
        f"--tensor-model-parallel-size {tp} does not divide --num-query-groups {groups}: attention runs with "
        f"{padded} groups, of which {padded - groups} are zero, and costs {padded / groups:.2f} times as much",
    )


def data_parallel_size(config: Config, world_size: int) -> int:
    """Ranks over which the batch is spread."""
    parallel = config.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return world_size // (model_ranks * parallel.context_parallel_size)


def _raise(problems: list[str]) -> None:
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} settings cannot be used:" + "".join(f"\n  - {text}" for text in problems))


def _layout(config: Config, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    if parallel.context_parallel_size != 1:
        yield (
            f"--context-parallel-size is {parallel.context_parallel_size}; only 1 is supported, because the attention "
            "over [prefix | chosen | rejected] needs the whole row on one rank. Use --tensor-model-parallel-size "
            "with --sequence-parallel for long rows"
        )
    elif world_size % (tp * pp):
        yield (
            f"{world_size} ranks were launched, which is no multiple of --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} = {tp * pp}; launch {tp * pp} ranks or a multiple "
            "(torchrun --nproc-per-node times --nnodes), or lower one of the two"
        )
    if parallel.sequence_parallel and tp == 1:
        yield "--sequence-parallel needs --tensor-model-parallel-size above 1; raise that or say --no-sequence-parallel"
    if parallel.use_distributed_optimizer:
        yield from _distributed_optimizer(config)


def _distributed_optimizer(config: Config) -> Iterator[str]:
    import torch

    from megatron_sip.model.installed import has_apex, has_transformer_engine

    # Its checkpoint is wrong with torch's Adam in megatron-core 0.16.1, so the fused Adams are required.
    if not torch.cuda.is_available() or not (has_transformer_engine() or has_apex()):
        yield (
            "--use-distributed-optimizer needs a GPU and the Adam of Transformer Engine or of NVIDIA's apex; "
            "install one of them (README) or leave the flag out"
        )
    if _stores_optimizer(config.checkpoint):
        yield (
            "--use-distributed-optimizer has state that --save and --load cannot carry: megatron-core's default format "
            "of it raises, and a resume from another one was never proven on GPUs; leave the flag out, or run without "
            "--save (and with --finetune, where --load names checkpoints)"
        )
    if "dpo" in config.training.objective and config.reference.reference != "frozen":
        yield (
            f"--use-distributed-optimizer shards the main weights that --reference {config.reference.reference} "
            "averages; say --reference frozen or leave --use-distributed-optimizer out"
        )


def _stores_optimizer(checkpoint: CheckpointConfig) -> bool:
    """Whether the optimizer's state is written, or taken up: a Hugging Face folder has none."""
    if checkpoint.save is not None:
        return True
    load = checkpoint.load
    return load is not None and not checkpoint.finetune and not (Path(load) / "config.json").is_file()


def _model(config: Config, model: ModelConfig) -> Iterator[str]:
    tp, pp = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    heads, groups, layers = model.num_attention_heads, model.num_query_groups, model.num_layers
    if heads is not None and groups is not None and heads % groups:
        yield f"--num-query-groups {groups} does not divide --num-attention-heads {heads}; every group has equal heads"
    if heads is not None and tp > heads:
        yield (
            f"--tensor-model-parallel-size {tp} does not divide --num-attention-heads {heads}, and some ranks would "
            f"have no head at all; use {heads} or fewer"
        )
    elif groups is not None and groups % tp and not config.parallel.pad_query_groups:
        fitting = [str(size) for size in range(1, groups + 1) if groups % size == 0]
        yield (
            f"--tensor-model-parallel-size {tp} does not divide --num-query-groups {groups} (--num-attention-heads "
            f"{heads}); use {' or '.join(fitting)}, or add groups of zeros with --pad-query-groups"
        )
    if model.ffn_hidden_size is not None and model.ffn_hidden_size % tp:
        yield (
            f"--tensor-model-parallel-size {tp} does not divide --ffn-hidden-size {model.ffn_hidden_size}; "
            "choose a size that does"
        )
    if layers is not None and layers < pp:
        yield (
            f"--pipeline-model-parallel-size {pp} is more than --num-layers {layers}, and every stage needs a layer; "
            f"use {layers} or fewer"
        )
    elif layers is not None and model.recompute_granularity == "full":
        fullest = largest_stage(layers, pp)
        if model.recompute_num_layers > fullest:
            yield (
                f"--recompute-num-layers {model.recompute_num_layers} is more than the {fullest} layers of a stage; "
                "lower it"
            )
    if model.kv_channels is not None and model.kv_channels % 2:
        yield f"--kv-channels {model.kv_channels} is odd; rotary embeddings turn pairs, so heads need an even width"


def _batch(config: Config, world_size: int) -> Iterator[str]:
    size, micro = config.training.global_batch_size, config.training.micro_batch_size
    dp = data_parallel_size(config, world_size)
    if dp < 1:
        return
    if size % dp:
        yield (
            f"--global-batch-size {size} does not divide over {dp} data parallel ranks ({world_size} ranks / tensor x "
            f"pipeline parallel size); make it a multiple of {dp}"
        )
    elif size % (micro * dp):
        yield (
            f"--global-batch-size {size} is no multiple of --micro-batch-size {micro} x {dp} data parallel ranks = "
            f"{micro * dp}; change one of the two"
        )


def _schedule(config: Config) -> Iterator[str]:
    optimizer, iterations = config.optimizer, config.training.train_iters
    if optimizer.min_lr is not None and optimizer.min_lr > optimizer.lr:
        yield f"--min-lr {optimizer.min_lr} is above --lr {optimizer.lr}; lower it, or leave it out for a tenth of --lr"
    decay = optimizer.lr_decay_iters or iterations
    if optimizer.lr_warmup_iters >= decay:
        name = "--lr-decay-iters" if optimizer.lr_decay_iters else "--train-iters"
        yield f"--lr-warmup-iters {optimizer.lr_warmup_iters} must be below {name} {decay}; shorten the warm-up"


def _lengths(config: Config, model: ModelConfig) -> Iterator[str]:
    data = config.data
    if config.training.objective == "ntp" and data.ntp_samples == "packed":
        if data.seq_length < 2:
            yield f"--seq-length {data.seq_length} leaves no token to predict; it must be at least 2"
    else:
        from megatron_sip.data.cut import CutRule

        try:
            CutRule.from_config(data)
        except ConfigError as error:
            yield str(error)
    if model.max_position_embeddings is not None and data.seq_length > model.max_position_embeddings:
        yield (
            f"--seq-length {data.seq_length} is more than --max-position-embeddings {model.max_position_embeddings}; "
            "the model knows no such positions. Lower --seq-length"
        )


def _folders(config: Config) -> Iterator[str]:
    checkpoint = config.checkpoint
    if not config.data.data_path:
        yield "--data-path is missing; name the prefix of a .bin/.idx corpus made by tools/preprocess_data.py"
    if config.data.tokenizer_model is None:
        yield "--tokenizer-model is missing; name the folder with the tokenizer of the policy"
    if checkpoint.save is None and checkpoint.save_interval is not None:
        yield "--save-interval is given without --save; name the folder for checkpoints"
    yield from _retention(checkpoint)
    if checkpoint.load is None:
        if checkpoint.finetune:
            yield "--finetune is given without --load; name the folder whose weights it starts from"
        return
    load, save = Path(checkpoint.load), Path(checkpoint.save) if checkpoint.save else None
    same = save is not None and save.resolve() == load.resolve()
    if not load.exists() and not same:
        yield f"--load {load} does not exist; name a folder of checkpoints or of a Hugging Face Llama, or leave it out"
    if same and (load / "config.json").is_file() and not (load / "latest_checkpointed_iteration.txt").exists():
        yield f"--save {save} is the Hugging Face folder of --load; checkpoints need a folder of their own"


def _retention(checkpoint: CheckpointConfig) -> Iterator[str]:
    given = {
        "--async-save": checkpoint.async_save,
        "--keep-last-n": checkpoint.keep_last_n,
        "--save-retain-interval": checkpoint.save_retain_interval,
    }
    for flag, value in given.items():
        if checkpoint.save is None and value:
            yield f"{flag} is given without --save; name the folder for checkpoints"
    interval, retained = checkpoint.save_interval, checkpoint.save_retain_interval
    if interval and retained and retained % interval:
        yield (
            f"--save-retain-interval {retained} is no multiple of --save-interval {interval}, so hardly a checkpoint "
            f"would be retained; make it one, such as {-(-retained // interval) * interval}"
        )


def _timeouts(config: Config) -> Iterator[str]:
    try:
        stage_timeouts(config.parallel.stage_timeout)
    except ConfigError as error:
        yield str(error)
