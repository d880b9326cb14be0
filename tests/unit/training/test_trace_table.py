"""The tables of a trace, by hand."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sip.training.trace_table import Line, Span, lines_of, read_spans, summary

CPU, GPU = ("1", "1"), ("0", "7")
REGION, OPERATION = "user_annotation", "cpu_op"


def spans() -> list[Span]:
    """A region of 10 s that holds two products, of which one holds a copy; a product of another thread; two kernels."""
    return [
        Span(OPERATION, "aten::mm", CPU, 1e6, 4e6),
        Span(OPERATION, "aten::copy_", CPU, 2e6, 1e6),
        Span(OPERATION, "aten::mm", CPU, 5e6, 2e6),
        Span(REGION, "sip::train", CPU, 0.0, 10e6),
        Span(OPERATION, "aten::mm", ("1", "2"), 1e6, 3e6),
        Span(REGION, "sip::rollout", CPU, -5e6, 5e6),
        Span("kernel", "gemm", GPU, 1e6, 0.5e6),
        Span("kernel", "gemm", GPU, 2e6, 0.5e6),
    ]


def test_own_time_is_without_what_lies_within() -> None:
    lines = {line.name: line for line in lines_of(span for span in spans() if span.track != GPU)}
    assert lines["aten::mm"] == Line("aten::mm", 3, 8.0, 9.0)
    assert lines["aten::copy_"] == Line("aten::copy_", 1, 1.0, 1.0)
    # On the other thread a product runs beside the region, not within it.
    assert lines["sip::train"] == Line("sip::train", 1, 4.0, 10.0)
    assert [line.name for line in lines_of(spans())][:2] == ["aten::mm", "sip::rollout"]


def test_parts_come_in_the_order_of_the_step_and_operations_by_their_own_time() -> None:
    rows = [line.split() for line in summary(spans()).splitlines() if line]
    assert [row[0] for row in rows if row[0] in ("part", "operation")] == ["part", "operation", "operation"]
    found = [row for row in rows if row[0] not in ("part", "operation")]
    assert found == [
        ["sip::rollout", "1", "5.0000", "5.0000"],
        ["sip::train", "1", "4.0000", "10.0000"],
        ["aten::mm", "3", "8.0000", "9.0000"],
        ["aten::copy_", "1", "1.0000", "1.0000"],
        ["gemm", "2", "1.0000", "1.0000"],
    ]
    assert "on the GPU" not in summary(spans()[:6])


def test_spans_are_read_from_a_trace(tmp_path: Path) -> None:
    event = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "pid": 1, "tid": 2, "ts": 3.5, "dur": 4.25}
    other = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
        {**event, "cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"ph": "i", "name": "Record Window End", "ts": 9},
    ]
    events = [{**event, "args": {"External id": 1}}, *other]
    (tmp_path / "t.json").write_text(json.dumps({"schemaVersion": 1, "deviceProperties": [], "traceEvents": events}))
    assert read_spans(tmp_path / "t.json") == [Span("cpu_op", "aten::mm", ("1", "2"), 3.5, 4.25)]
