"""The flags that the step bench and its sweep share, and what they mean."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields, replace
from typing import Any

from megatron_sip.config.groups import ModelConfig
from megatron_sip.config.numbers import amount, whole_number
from megatron_sip.config.presets import with_preset
from megatron_sip.cost.sizes import ModelSizes, model_sizes
from megatron_sip.errors import ConfigError
from tools.bench import machine
from tools.bench.step_spec import DEFAULT_MODEL, HF_CACHES, Point, Spec

COMPARED = ("hf", "unshared")
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All shared flags."""
    one = whole_number(1)
    parser.add_argument("--prefix", type=one, default=1024, help="tokens of a prefix (default: 1024)")
    parser.add_argument("--suffix", type=one, default=128, help="tokens of a suffix (default: 128)")
    parser.add_argument("--k", type=one, default=16, help="rollouts of a prefix (default: 16)")
    parser.add_argument("--batch", type=one, default=4, help="prefixes of a step (default: 4)")
    parser.add_argument(
        "--compare",
        nargs="+",
        choices=COMPARED,
        default=[],
        help="hf: the same step with transformers; unshared: reference and train with two rows a pair",
    )
    parser.add_argument("--judge-seconds", type=amount, default=0.0, help="time of a scripted judge (default: none)")
    parser.add_argument("--judge-lag", type=int, choices=(0, 1), default=0, help="of our arm (default: 0)")
    parser.add_argument("--repeats", type=one, default=3, help="times that all arms are run in turn (default: 3)")
    parser.add_argument("--steps", type=one, default=1, help="steps in a row of one measurement (default: 1)")
    parser.add_argument("--no-save", action="store_true", help="do not time a checkpoint besides")
    parser.add_argument("--seed", type=whole_number(0), default=1, help="seed of weights, tokens and scores")
    _add_model_flags(parser.add_argument_group("model", "default: a Llama of 9.6M parameters, or what a preset has"))
    _add_run_flags(parser.add_argument_group("run"))


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model-preset", help="an architecture by name")
    for name in _SIZES:
        group.add_argument("--" + name.replace("_", "-"), type=whole_number(1))
    group.add_argument("--untie-embeddings-and-output-weights", action=argparse.BooleanOptionalAction)


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    one = whole_number(1)
    group.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of all arms (default: fp32)")
    group.add_argument("--threads", type=one, help="CPU threads of a rank (default: cores over ranks)")
    group.add_argument("--tensor-model-parallel-size", type=one, default=1, help="ours (default: 1)")
    group.add_argument("--pipeline-model-parallel-size", type=one, default=1, help="ours (default: 1)")
    group.add_argument("--sequence-parallel", action="store_true", help="ours; needs TP above 1")
    group.add_argument("--shared-prefix", choices=("on", "off"), default="on", help="ours: one row a pair, or two")
    group.add_argument("--micro-batch-size", type=one, default=1, help="ours: pairs of a pass (default: 1)")
    group.add_argument("--rollout-batch-size", type=one, help="ours: prefixes of a wave (default: all)")
    group.add_argument("--rollout-pipeline-groups", type=one, help="ours: groups of a wave (default: PP)")
    group.add_argument(
        "--rollout-cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="ours: decode by CUDA graphs (default: on a GPU, without TP and PP)",
    )
    group.add_argument("--hf-micro-batch-size", type=one, help="hf: pairs of a pass (default: all)")
    group.add_argument(
        "--hf-cache",
        choices=HF_CACHES,
        nargs="+",
        default=list(HF_CACHES),
        help="hf: caches of generate that are measured, of which the faster counts (default: both)",
    )
    group.add_argument(
        "--matmul-sizes", type=one, nargs="+", default=[1024, 2048, 4096], help="of the products that give the floor"
    )


def point_of(options: argparse.Namespace) -> Point:
    """The point that the flags name."""
    return Point(options.prefix, options.suffix, options.k, options.batch, options.judge_seconds)


def model_of(options: argparse.Namespace) -> ModelConfig:
    """The architecture that the flags name, every size filled in.

    Raises:
        ConfigError: an unknown preset, or sizes that do not fit together.
    """
    names = (*_SIZES, "untie_embeddings_and_output_weights")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.model_preset is None:
        model = replace(DEFAULT_MODEL, **given)
    else:
        model = ModelConfig(model_preset=options.model_preset, **given)
    model = replace(with_preset(model), model_preset=None)
    model_sizes(model)
    return model


def spec_of(options: argparse.Namespace) -> Spec:
    """The settings of the arms; folders are filled in by the bench.

    Raises:
        ConfigError: flags that do not fit together.
    """
    tensor, pipeline = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
    if options.batch % options.micro_batch_size:
        raise ConfigError(
            f"--batch {options.batch} is no multiple of --micro-batch-size {options.micro_batch_size}; change one"
        )
    if options.sequence_parallel and tensor == 1:
        raise ConfigError("--sequence-parallel needs --tensor-model-parallel-size above 1; raise that")
    return Spec(
        model=model_of(options),
        tokenizer="",
        dtype=options.dtype,
        threads=options.threads or max(1, (os.cpu_count() or 1) // (tensor * pipeline)),
        tensor=tensor,
        pipeline=pipeline,
        sequence_parallel=options.sequence_parallel,
        shared_prefix=options.shared_prefix == "on",
        judge_lag=options.judge_lag,
        micro_batch_size=options.micro_batch_size,
        rollout_batch_size=options.rollout_batch_size,
        rollout_pipeline_groups=options.rollout_pipeline_groups,
        rollout_cuda_graph=options.rollout_cuda_graph,
        hf_micro_batch_size=options.hf_micro_batch_size,
        hf_caches=tuple(options.hf_cache),
        seed=options.seed,
        matmul_sizes=tuple(options.matmul_sizes),
    )


def surroundings(spec: Spec, sizes: ModelSizes, gpu: str | None, load_before: float) -> dict[str, Any]:
    """What a bench's JSON tells besides its points."""
    settings = {item.name: getattr(spec, item.name) for item in fields(spec)}
    own = ("model", "tokenizer", "save", "matmul_sizes", "tensor", "pipeline")
    return {
        **machine.facts(gpu),
        "load_average": {"before": load_before, "after": machine.load_average()},
        "ranks": spec.ranks,
        "parameters": sizes.parameters,
        "model": vars(sizes),
        **{name: value for name, value in settings.items() if name not in own},
    }
