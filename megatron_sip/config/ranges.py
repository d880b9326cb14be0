"""The range of every single number among the settings; relations between settings are in `validate.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megatron_sip.config.fields import flag_of, settings
from megatron_sip.config.groups import Config

_AT_LEAST_ONE = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("max_position_embeddings", "rope_original_max_position", "vocab_size", "make_vocab_size_divisible_by"),
    *("recompute_num_layers", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
    *("context_parallel_size", "distributed_timeout_minutes", "seq_length", "suffix_length", "min_prefix_length"),
    *("max_prefix_length", "min_document_length", "micro_batch_size", "global_batch_size", "train_iters"),
    "logits_chunk_mib",
    *("max_skipped_iterations", "num_threads", "lr_decay_iters", "num_rollouts", "rollout_batch_size"),
    *("rollout_concurrency", "rollout_pipeline_groups", "profile_step_end"),
    *("reference_update_interval", "judge_max_context", "judge_interval", "likelihood_interval"),
    *("judge_votes", "judge_max_tokens", "judge_missing_window", "loss_spike_window"),
    *("judge_concurrency", "rewrite_interval", "rewrite_ahead", "save_interval", "log_interval", "sample_log_interval"),
    *(
        "keep_last_n",
        "save_retain_interval",
        "rewriter_max_tokens",
        "adaptive_rounds",
        "adaptive_budget",
        "adaptive_repeats",
    ),
)
_ABOVE_ZERO = (
    *("rotary_base", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "norm_epsilon"),
    *("init_method_std", "exit_duration_in_mins", "lr", "adam_eps", "beta", "judge_timeout"),
    *("loss_spike_threshold", "judge_hedge_after", "judge_cache_size_gb"),
    *("rollout_tolerance", "rollout_timeout", "rollout_memory_gib", "peak_tflops"),
)
_AT_LEAST_ZERO = (
    *("seed", "min_lr", "sigterm_grace", "lr_warmup_iters", "weight_decay", "clip_grad", "temperature", "nll_weight"),
    *("prefix_ntp_weight", "curriculum_rollout_start", "curriculum_rollout_ramp", "curriculum_bonus"),
    *("curriculum_bonus_iters", "quality_weight", "safety_weight", "factuality_weight", "likelihood_weight"),
    *("classifier_weight", "judge_temperature", "judge_retries", "rewriter_temperature", "max_rollbacks"),
    *("reward_weight", "reward_label", "rollout_retries", "profile_step_start"),
)
_ABOVE_ZERO_UP_TO_ONE = ("top_p", "judge_top_p", "rewriter_top_p", "adaptive_confidence")
_ZERO_TO_ONE = ("judge_lag", "min_answered_fraction", "screen_safety_below", "screen_repetition_above")
_ZERO_TO_BELOW_ONE = ("adam_beta1", "adam_beta2", "reference_ema_decay", "judge_max_missing_share")
_NOT_ZERO = ("reward_scale",)
_FINITE = ("reward_offset",)

_RULES = (
    (_AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
    (_ABOVE_ZERO, "above 0", lambda value: value > 0),
    (_AT_LEAST_ZERO, "at least 0", lambda value: value >= 0),
    (_ABOVE_ZERO_UP_TO_ONE, "above 0 and at most 1", lambda value: 0 < value <= 1),
    (_ZERO_TO_ONE, "between 0 and 1", lambda value: 0 <= value <= 1),
    (_ZERO_TO_BELOW_ONE, "at least 0 and below 1", lambda value: 0 <= value < 1),
    (_NOT_ZERO, "a finite number other than 0", lambda value: value != 0),
    (_FINITE, "a finite number", math.isfinite),
)


def ranged_settings() -> set[str]:
    """Names of the settings that have a rule here."""
    return {name for names, _, _ in _RULES for name in names}


def out_of_range(config: Config) -> Iterator[str]:
    """A sentence for each number that is out of its own range; None is in range where the setting may be None."""
    for names, _, _ in _RULES:
        for name in names:
            value = getattr(getattr(config, settings()[name].group), name)
            wanted = wanted_range(name, value)
            if wanted:
                yield f"{flag_of(name)} is {value}; it must be {wanted}"


def wanted_range(name: str, value: Any) -> str | None:
    """The range of the setting `name` in words where `value` is out of it; None for all else."""
    for names, text, holds in _RULES:
        if name in names and value is not None and not (math.isfinite(value) and holds(value)):
            return text
    return None
