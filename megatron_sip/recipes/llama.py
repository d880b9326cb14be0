"""Recipes for Llama policies: functions that return a `Config`.

Steps, batch, K, learning rates and warm-up are the paper's (arXiv 2601.21343, section 5); layouts and
micro-batches are ours, for GPUs with 80 GB. Corpus, tokenizer, `--load`, `--save` and the judge's URL are the user's
to add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from megatron_sip.config.groups import Config, JudgeConfig, PoolMember

Goal = Literal["quality", "factuality", "safety"]


def _with_goal(config: Config, goal: Goal) -> Config:
    """Pool and judges of the paper's three headline runs (method section 2)."""
    pool: tuple[PoolMember, ...] = ("original", "rollout") if goal == "safety" else ("rollout",)
    judge = replace(
        config.judge,
        quality_weight=float(goal in ("quality", "safety")),
        factuality_weight=float(goal == "factuality"),
        safety_weight=float(goal == "safety"),
    )
    return replace(config, preference=replace(config.preference, pool=pool), judge=judge)


def _judge(config: Config) -> JudgeConfig:
    """The prompted judge at temperature 1.0 and top-p 1.0; a reasoning model needs room before its verdict."""
    return replace(config.judge, judge_temperature=1.0, judge_top_p=1.0, judge_max_tokens=2048, judge_concurrency=256)


def _continual(preset: str, goal: Goal) -> Config:
    """Continual pretraining of a base model: 2000 steps of 256 prefixes, K = 16, online DPO."""
    config = Config()
    config = replace(
        config,
        model=replace(config.model, model_preset=preset),
        data=replace(config.data, seq_length=2048, suffix_length=128, split_mode="random"),
        training=replace(
            config.training,
            objective="online-dpo",
            global_batch_size=256,
            micro_batch_size=1,
            train_iters=2000,
            bf16=True,
        ),
        # The final rate is a tenth of the peak and the decay takes all steps by default, as in the paper.
        optimizer=replace(config.optimizer, lr=5e-6, lr_decay_style="cosine", lr_warmup_iters=100),
        rollout=replace(config.rollout, num_rollouts=16, temperature=1.0, top_p=1.0),
        judge=_judge(config),
    )
    return _with_goal(config, goal)


def llama_1b4_sip(goal: Goal = "quality") -> Config:
    """The paper's headline runs on a 1.4B Llama; 64 GPUs hold 64 copies with 4 prefixes each. `--load` its base."""
    return _continual("llama-1.4b", goal)


def llama_1b4_from_scratch() -> Config:
    """The paper's run from scratch: 21,000 steps of RF-NLL, one rollout against the rewrite.

    Quality and safety judge it with equal weight (ours; the paper reports both).
    """
    config = _continual("llama-1.4b", "safety")
    return replace(
        config,
        training=replace(config.training, objective="rf-nll", train_iters=21_000),
        optimizer=replace(config.optimizer, lr=5e-4, lr_warmup_iters=2000),
        rollout=replace(config.rollout, num_rollouts=1),
        preference=replace(config.preference, pool=("rewrite", "rollout")),
    )


def llama3_2_1b_sip(goal: Goal = "quality") -> Config:
    """The same on Llama 3.2 1B, which fits one GPU."""
    return _continual("llama3.2-1b", goal)


def llama3_8b_sip(goal: Goal = "quality") -> Config:
    """The same on Llama 3 8B: TP 8 with sequence parallel within a node, so that optimizer and weights fit.

    8.0e9 parameters x 18 bytes (bf16 weight, fp32 gradient, main weight and two Adam moments) / 8 = 18 GB a GPU.
    """
    config = _continual("llama3-8b", goal)
    parallel = replace(config.parallel, tensor_model_parallel_size=8, sequence_parallel=True)
    return replace(config, parallel=parallel)


def llama_tiny_smoke() -> Config:
    """A few steps of the tiny Llama at TP 2 on any machine; the local classifier judges, so it needs no server."""
    config = Config()
    return replace(
        config,
        model=replace(config.model, model_preset="llama-tiny"),
        parallel=replace(config.parallel, tensor_model_parallel_size=2),
        data=replace(config.data, seq_length=160, suffix_length=32),
        training=replace(config.training, global_batch_size=8, micro_batch_size=2, train_iters=5),
        optimizer=replace(config.optimizer, lr=1e-4),
        rollout=replace(config.rollout, num_rollouts=4),
        judge=replace(config.judge, quality_weight=0.0, classifier_weight=1.0),
    )


def recipes() -> dict[str, Callable[..., Config]]:
    """The recipes by name."""
    functions = (llama_1b4_sip, llama_1b4_from_scratch, llama3_2_1b_sip, llama3_8b_sip, llama_tiny_smoke)
    return {function.__name__: function for function in functions}


def recipe_of_preset() -> dict[str, Callable[..., Config]]:
    """The recipe that stands for a `--model-preset`, for scripts that know the model's name only."""
    return {
        "llama-1.4b": llama_1b4_sip,
        "llama3.2-1b": llama3_2_1b_sip,
        "llama3-8b": llama3_8b_sip,
        "llama-tiny": llama_tiny_smoke,
    }
