"""Whether one run repeats another bit for bit: metrics, samples, what was trained, the last checkpoint's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from murder import Course
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_sip.checkpoint.latest import checkpoint_folder
from megatron_sip.metrics.jsonl import read_jsonl
from megatron_sip.training.audit import effective_steps, read_audit
from megatron_sip.training.audit_check import check_audit

CLOCKS = ("time/", "throughput/", "unix_time", "elapsed_ms")
OF_ASKING = ("judge/from_journal", "judge/prompts_trimmed")
"""Nobody is asked for what the journal holds."""


def differences(one: Course, other: Course) -> list[str]:
    """All that two finished runs do not have in common."""
    last = one.checkpoint()
    found = [] if last == other.checkpoint() else [f"they ended at iterations {last} and {other.checkpoint()}"]
    found += record_differences(records(one.metrics), records(other.metrics))
    found += record_differences(records(one.samples), records(other.samples))
    found += record_differences(trained(one.audit), trained(other.audit))
    return found + tensor_differences(tensors(one.saved, last), tensors(other.saved, last))


def records(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file without what may differ when steps are made again."""
    return [
        {key: value for key, value in line.items() if not key.startswith((*CLOCKS, *OF_ASKING))}
        for line in read_jsonl(file)
    ]


def trained(audit: Path) -> list[dict[str, Any]]:
    """What every step made of every sample, in a log without a fault."""
    found = read_audit(audit)
    assert check_audit(found).faults == ()
    return effective_steps(found)


def tensors(saved: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its global name, whole: weights, optimizer, reference."""
    reader = dcp.FileSystemReader(checkpoint_folder(saved, iteration))
    whole = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(whole, storage_reader=reader, no_dist=True)
    return whole


def record_differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[str]:
    """What differs, by record; JSON spells a number so that it is read bit for bit."""
    found = [] if len(one) == len(other) else [f"{len(one)} and {len(other)} records"]
    for left, right in zip(one, other, strict=False):
        name = f"iteration {left.get('iteration')}, sample {left.get('sample_index')}"
        differing = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
        found += [f"{name}: {key} is {left.get(key)!r} and {right.get(key)!r}" for key in differing]
    return found


def tensor_differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that one run lacks, or whose bits differ."""
    found = [f"{name} is in one run alone" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        left, right = one[name], other[name]
        same = left.dtype == right.dtype and left.shape == right.shape
        if not same or not torch.equal(_bytes(left), _bytes(right)):
            found.append(f"{name} differs")
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
