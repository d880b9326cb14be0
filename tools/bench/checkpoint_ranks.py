"""The ranks of `checkpoint.py stall`: steps on random pairs, with saves between them, and what both took.

torchrun checkpoint_ranks.py SPEC.json

SPEC.json: {"preset", "vocab_size", "saves", "width", "folder"}; the main rank writes FOLDER/result.json: by mode of
saving the seconds of the steps beside and during a save, and of each save.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_sip.checkpoint.lock import SaveLock
from megatron_sip.checkpoint.progress import Progress
from megatron_sip.config.groups import CheckpointConfig, Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_sip.config.presets import resolve_model
from megatron_sip.parallel import world as world_module
from megatron_sip.types import PreferenceBatch

WARM_UP, QUIET = 3, 6
"""Steps before anything is measured, and between a save that is durable and the next one."""


def random_pairs(config: Config, width: int, seed: int) -> PreferenceBatch:
    """Two pairs of random tokens; a third of the width each for prefix, chosen and rejected."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.model.vocab_size or 0
    tokens = torch.randint(1, vocabulary, (2, 3 * (width // 3)), generator=generator)
    lengths = torch.full((2,), width // 3)
    return PreferenceBatch(tokens, lengths, lengths, lengths, torch.ones(2), torch.tensor([2 * seed, 2 * seed + 1]))


class Bench:
    """One trainer, and the steps and saves that it makes."""

    def __init__(self, spec: dict[str, Any], ranks: int) -> None:
        self._width, self._saves = spec["width"], spec["saves"]
        self._config = resolve_model(
            Config(
                model=ModelConfig(model_preset=spec["preset"]),
                parallel=ParallelConfig(tensor_model_parallel_size=ranks, pad_query_groups=True),
                training=TrainingConfig(micro_batch_size=1, global_batch_size=2, train_iters=100000),
                checkpoint=CheckpointConfig(save=spec["folder"], keep_last_n=1),
            ),
            spec["vocab_size"],
        )
        self.world = world_module.start(self._config)
        from megatron_sip.checkpoint.writer import CheckpointWriter
        from megatron_sip.model.build import build_policy
        from megatron_sip.training.step import PolicyTrainer

        self._writer_of = CheckpointWriter
        self._trainer = PolicyTrainer(build_policy(self._config, self.world), self._config, self.world)
        self._iteration = 0
        for _ in range(WARM_UP):
            self._step(None)

    def _step(self, writer: Any) -> tuple[float, Any]:
        """Seconds of a step with the look at a save, and what that saw."""
        self._iteration += 1
        batch, started = random_pairs(self._config, self._width, self._iteration), time.perf_counter()
        self._trainer.step(batch)
        named = writer.poll() if writer else None
        return time.perf_counter() - started, named

    def run(self, asynchronous: bool) -> dict[str, list[float]]:
        """Saves of one kind, with steps around them; all in seconds."""
        settings = replace(self._config.checkpoint, async_save=asynchronous)
        config = replace(self._config, checkpoint=settings)
        writer = self._writer_of(config, self.world, lambda _text: None, SaveLock(None, print))
        writer.prepare()
        found: dict[str, list[float]] = {name: [] for name in ("quiet", "during", "stall", "processor", "durable")}
        for _ in range(self._saves):
            found["quiet"] += [self._step(writer)[0] for _ in range(QUIET)]
            started, spent = time.perf_counter(), time.thread_time()
            writer.save(self._trainer, Progress(self._iteration, 2 * self._iteration, {}))
            found["stall"].append(time.perf_counter() - started)
            found["processor"].append(time.thread_time() - spent)
            named = None if asynchronous else writer.last_saved
            while named is None:
                seconds, named = self._step(writer)
                found["during"].append(seconds)
            found["durable"].append(time.perf_counter() - started)
        return found


def run_ranks() -> None:
    """Measure both kinds of saving."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    bench = Bench(spec, spec["ranks"])
    result = {mode: bench.run(mode == "asynchronous") for mode in ("synchronous", "asynchronous")}
    if bench.world.is_main:
        (Path(spec["folder"]) / "result.json").write_text(json.dumps(result))
    world_module.stop()


if __name__ == "__main__":
    run_ranks()
