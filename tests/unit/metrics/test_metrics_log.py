from __future__ import annotations

import math
from datetime import datetime

from megatron_sip.metrics.log import format_line
from megatron_sip.metrics.names import metric_specs

WHEN = datetime(2026, 1, 1, 12, 0, 0)


def test_line_is_megatrons():
    line = format_line(
        8,
        20,
        {
            "consumed_samples": 64,
            "elapsed_ms": 1234.56,
            "learning_rate": 5e-6,
            "global_batch_size": 8,
            "loss": 0.693147,
            "grad_norm": 1.5,
        },
        when=WHEN,
    )
    assert line == (
        " [2026-01-01 12:00:00] iteration        8/      20 | consumed samples:           64 |"
        " elapsed time per iteration (ms): 1234.6 | learning rate: 5.000000E-06 | global batch size:     8 |"
        " loss: 6.931470E-01 | grad norm: 1.500 |"
    )


def test_negative_and_non_finite_values_are_printed():
    line = format_line(1, 2, {"loss": -0.25, "rewards/margins": -1.5, "grad_norm": math.nan}, when=WHEN)
    assert "| loss: -2.500000E-01 |" in line
    assert "| margin: -1.5000 |" in line
    assert "| grad norm: nan |" in line


def test_absent_is_absent_and_only_telling_zeros_are_shown():
    line = format_line(1, 2, {"pairs/tie": 0.0, "judge/missing": 0.0, "chosen/share_rewrite": 0.0}, when=WHEN)
    assert "tie" not in line
    assert "| missing verdicts: 0 |" in line
    assert "| chosen rewrite: 0.00 |" in line
    assert "chosen original" not in line
    assert "loss" not in line


def test_sip_metrics_have_their_places():
    metrics = {
        "chosen/share_original": 0.25,
        "chosen/share_rollout": 0.75,
        "scores/original": 1.25,
        "scores/margin": 0.5,
        "pairs/valid": 6.0,
        "pairs/tie": 2.0,
        "judge/missing_timeout": 3.0,
        "steps/skipped": 1.0,
        "time/rollout": 1.0,
        "time/judge_wait": 2.345,
        "time/reference": 0.5,
        "time/train": 4.0,
    }
    line = format_line(3, 9, metrics, when=WHEN)
    for part in (
        "chosen original: 0.25",
        "chosen rollout: 0.75",
        "score original: 1.250",
        "score margin: 0.500",
        "valid pairs: 6",
        "no pair, tie: 2",
        "missing, timeout: 3",
        "number of skipped iterations:   1",
        "rollout (s): 1.00",
        "judge wait (s): 2.35",
        "reference (s): 0.50",
        "train (s): 4.00",
    ):
        assert f"| {part} |" in line, part


def test_labels_are_unique_and_names_are_unique():
    specs = metric_specs(["quality", "safety"])
    assert len({spec.name for spec in specs}) == len(specs)
    labels = [spec.label for spec in specs if spec.label is not None]
    assert len(set(labels)) == len(labels)
    assert metric_specs(["safety", "quality"]) == specs
