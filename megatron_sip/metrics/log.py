"""The log line of one iteration, in the format that users of Megatron and their scripts know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from megatron_sip.metrics.names import MetricSpec, metric_specs


def format_line(
    iteration: int,
    train_iters: int,
    metrics: Mapping[str, float],
    *,
    when: datetime | None = None,
    specs: Sequence[MetricSpec] | None = None,
) -> str:
    """One line for one iteration; a metric that is absent from `metrics` is absent from the line.

    `consumed_samples`, `elapsed_ms` (milliseconds per iteration), `learning_rate` and
    `global_batch_size` come first, as in Megatron, then the metrics of `specs` (default: all of
    `names.metric_specs`) that have a label. Negative and non-finite values are printed as they are.
    """
    moment = datetime.now() if when is None else when
    parts = [f" [{moment:%Y-%m-%d %H:%M:%S}] iteration {iteration:8d}/{train_iters:8d}"]
    if "consumed_samples" in metrics:
        parts.append(f"consumed samples: {int(metrics['consumed_samples']):12d}")
    if "elapsed_ms" in metrics:
        parts.append(f"elapsed time per iteration (ms): {metrics['elapsed_ms']:.1f}")
    if "learning_rate" in metrics:
        parts.append(f"learning rate: {metrics['learning_rate']:.6E}")
    if "global_batch_size" in metrics:
        parts.append(f"global batch size: {int(metrics['global_batch_size']):5d}")
    for spec in metric_specs() if specs is None else specs:
        value = metrics.get(spec.name)
        if spec.label is None or value is None or (value == 0 and not spec.show_zero):
            continue
        parts.append(f"{spec.label}: {value:{spec.form}}")
    return " | ".join(parts) + " |"
