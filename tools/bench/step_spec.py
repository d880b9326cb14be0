"""What a step bench measures: the model, the settings of the arms, and the points. No torch is imported here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_sip.config.groups import ModelConfig
from megatron_sip.config.presets import presets
from megatron_sip.cost.flops import StepWork

HF_CACHES = ("dynamic", "static")
"""The caches that `generate` of transformers may have for all rows: which is faster depends on model and sizes."""
DEFAULT_MODEL = replace(presets()["llama-9.6m"], vocab_size=4096)
"""9.6M parameters: what two CPU cores step in seconds."""


@dataclass(frozen=True)
class Point:
    """One size of a step, in tokens and counts, and the layout of its ranks.

    `judge_seconds` is what the scripted judge takes for the whole batch.
    """

    prefix: int
    suffix: int
    rollouts: int
    batch: int
    judge_seconds: float = 0.0

    def work(self, share_prefix: bool = True) -> StepWork:
        """The same for the count of operations."""
        return StepWork(self.prefix, self.suffix, self.rollouts, self.batch, share_prefix=share_prefix)

    @property
    def small(self) -> Point:
        """A point to warm up with: the same code in a fraction of the time."""
        return Point(
            prefix=max(2, self.prefix // 16),
            suffix=max(2, self.suffix // 16),
            rollouts=min(2, self.rollouts),
            batch=self.batch,
        )


@dataclass(frozen=True)
class Spec:
    """The settings of a bench's arms; it travels to them as JSON.

    `threads` are those of one rank. `micro_batch_size` and `hf_micro_batch_size` count pairs of one pass; None takes
    the whole batch. `tokenizer` and `save` are folders; without `save` no checkpoint is written.
    """

    model: ModelConfig
    tokenizer: str
    save: str | None = None
    dtype: str = "fp32"
    threads: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence_parallel: bool = False
    shared_prefix: bool = True
    judge_lag: int = 0
    micro_batch_size: int | None = 1
    rollout_batch_size: int | None = None
    rollout_pipeline_groups: int | None = None
    rollout_cuda_graph: bool | None = None
    hf_micro_batch_size: int | None = None
    hf_caches: tuple[str, ...] = HF_CACHES
    seed: int = 1
    matmul_sizes: tuple[int, ...] = (1024, 2048, 4096)

    @property
    def ranks(self) -> int:
        """Processes of our arm."""
        return self.tensor * self.pipeline

    @property
    def all_threads(self) -> int:
        """CPU threads of an arm of one process: as many as our ranks have, but no more than there are cores."""
        return min(self.threads * self.ranks, max(self.threads, os.cpu_count() or 1))

    def with_layout(self, tensor: int, pipeline: int) -> Spec:
        """Other ranks that share the threads, as far as each rank gets one."""
        return replace(
            self,
            tensor=tensor,
            pipeline=pipeline,
            threads=max(1, self.all_threads // (tensor * pipeline)),
            sequence_parallel=self.sequence_parallel and tensor > 1,
        )

    def to_json(self) -> str:
        """For `from_json` in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """What `to_json` wrote."""
        values: Mapping[str, Any] = json.loads(text)
        model = ModelConfig(**values["model"])
        lists = {name: tuple(values[name]) for name in ("matmul_sizes", "hf_caches")}
        return cls(**{**values, "model": model, **lists})
