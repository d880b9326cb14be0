"""The range of every single number of a plan: above 0, unless it is named here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megatron_sip.config.fields import flag_of

_MAY_BE_ZERO = (
    *("num_rollouts", "rollout_gpus", "judge_lag", "quality_weight", "safety_weight", "factuality_weight"),
    *("layer_overhead_us", "eager_layer_overhead_us", "server_layer_overhead_us", "tp_latency_us"),
    *("token_overhead_us", "judge_token_overhead_ms", "judge_cache_kb"),
    *("memory_reserve", "overlap_loss"),
)
_AT_MOST_ONE = (
    *("memory_reserve", "train_mfu", "forward_mfu", "decode_mfu", "decode_bandwidth_share", "update_bandwidth_share"),
    *("overlap_loss", "judge_lag", "judge_prefill_mfu", "judge_decode_mfu", "judge_bandwidth_share"),
)


def out_of_range(*groups: Any) -> Iterator[str]:
    """A sentence for each number of these dataclasses that is out of its range; None is in range where it may be."""
    for group in groups:
        for item in fields(group):
            value = getattr(group, item.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            zero, most = item.name in _MAY_BE_ZERO, 1 if item.name in _AT_MOST_ONE else math.inf
            if not (math.isfinite(value) and 0 <= value <= most) or (value == 0 and not zero):
                bound = "at least 0" if zero else "above 0"
                bound += " and at most 1" if most == 1 else ""
                yield f"{flag_of(item.name)} is {value}; it must be {bound}"
