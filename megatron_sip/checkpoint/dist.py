"""What a checkpoint of ours holds, and how a run takes it up again.

    <save>/iter_0000020/            .metadata, *.distcp, common.pt, run_config.yaml, manifest.json
    <save>/latest_checkpointed_iteration.txt

megatron-core's distributed format: every tensor whole, whatever layout wrote it. `writer` makes such a folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sip.checkpoint.agree import attempt
from megatron_sip.checkpoint.latest import cause, first_line
from megatron_sip.checkpoint.manifest import COMMON, FORMAT_VERSION, require_known_version
from megatron_sip.checkpoint.progress import Progress, from_state, to_state
from megatron_sip.checkpoint.restricted import RestrictedReader, load_pickled
from megatron_sip.checkpoint.strategies import load_sharded
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.world import World
from megatron_sip.training.step import PolicyTrainer

_READ_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError, CheckpointException, CheckpointingException)
# Settings of megatron-core's schedule by their names in its state.
_SCHEDULE = ("max_lr", "min_lr", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "start_wd", "end_wd")


def _reference_shards(trainer: PolicyTrainer) -> dict[str, Any]:
    """The reference's host tensors, sharded exactly as the policy's parameters are."""
    if trainer.reference is None:
        return {}
    tensors, shards = trainer.reference.tensors, {}
    for name, shard in trainer.policy.sharded_state_dict(prefix="reference.").items():
        local = name.removeprefix("reference.")
        if local not in tensors:
            continue  # extra state of Transformer Engine layers, not a parameter
        if isinstance(shard, ShardedTensor):
            shards[local] = replace(shard, data=tensors[local], dtype=torch.float32)
        elif isinstance(shard, ShardedTensorFactory):
            shards[local] = replace(shard, data=tensors[local])
        else:
            raise TypeError(f"the policy's {local} has an unexpected shard of type {type(shard).__name__}")
    return shards


def _state(trainer: PolicyTrainer, *, loading: bool, with_training: bool = True) -> dict[str, Any]:
    """What is saved, as megatron-core's sharded state dict; on loading it tells the wanted shapes."""
    model = trainer.policy.sharded_state_dict()
    state: dict[str, Any] = {"model": model}
    if with_training:
        state["optimizer"] = trainer.optimizer.sharded_state_dict(model, is_loading=loading)
        state["reference"] = _reference_shards(trainer)
    return state


def state_to_save(trainer: PolicyTrainer, progress: Progress) -> dict[str, Any]:
    """The whole state of a run: shards that refer to the trainer's own tensors, and plain values."""
    return {
        **_state(trainer, loading=False),
        "format_version": FORMAT_VERSION,
        **to_state(progress),
        "scheduler": trainer.scheduler.state_dict(),
        "reference_steps": trainer.reference.optimizer_steps if trainer.reference else 0,
        "torch_rng": torch.get_rng_state(),
    }


def load(
    folder: Path, world: World, trainer: PolicyTrainer, say: Callable[[str], None], *, weights_only: bool
) -> Progress:
    """Load one checkpoint folder into the trainer; all ranks call it together.

    `weights_only` takes the policy alone (`--finetune`): the optimizer, the schedule and the position start anew.
    `say` hears of everything that is not simply what the checkpoint holds.

    Raises:
        CheckpointError: it is damaged, it would run code, or it belongs to a model of another shape.
    """
    reader, common = attempt(world, lambda: _open(folder))
    progress = Progress(0, 0, {}) if weights_only else _progress(folder, common, trainer.policy.real_vocab_size)
    wanted = _state(trainer, loading=True, with_training=not weights_only)
    absent = set() if weights_only else _absent_parts(reader)
    try:
        state = load_sharded({key: part for key, part in wanted.items() if key not in absent}, reader, common)
    except _READ_ERRORS as error:
        if isinstance(cause(error), CheckpointError):
            raise cause(error) from error
        raise CheckpointError(
            f"--load {folder} does not fit this run: {first_line(error)}; the model flags must be those in its "
            "run_config.yaml, and its files complete"
        ) from error
    trainer.policy.load_state_dict(state["model"], strict=True)
    if weights_only:
        trainer.after_weights_changed()
        if trainer.reference:
            say("the reference policy starts as a copy of the policy")
        return progress
    if "optimizer" in absent:
        say(f"{folder} holds no optimizer state; the optimizer starts anew")
        _begin_optimizer_anew(trainer)
    else:
        trainer.optimizer.load_state_dict(state["optimizer"])
    _load_schedule(trainer, state["scheduler"], say)
    torch.set_rng_state(state["torch_rng"])
    if trainer.reference:
        if state.get("reference"):
            trainer.reference.load(state["reference"], state["reference_steps"])
        else:
            say(f"{folder} holds no reference policy; it starts as a copy of the policy")
            trainer.reference.copy_policy()
    return progress


def _open(folder: Path) -> tuple[RestrictedReader, dict[str, Any]]:
    """Reader and common state of a folder, checked before anything else touches it."""
    common = load_pickled(folder / COMMON, str(folder / COMMON))
    if not isinstance(common, dict):
        raise CheckpointError(f"{folder / COMMON} holds no state of a run; name another checkpoint")
    require_known_version(folder, common.get("format_version"))
    return RestrictedReader(folder), common


def _progress(folder: Path, common: dict[str, Any], vocabulary: int) -> Progress:
    """Where the run stood, if the common state is that of a run."""
    missing = {"scheduler", "torch_rng", "reference_steps"} - common.keys()
    try:
        if missing:
            raise KeyError(min(missing))
        progress = from_state(common)
        if progress.pending is not None and bool((progress.pending.rollouts.tokens >= vocabulary).any()):
            raise ValueError(f"the rollouts of the next batch hold tokens beyond the vocabulary of {vocabulary}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / COMMON} does not say where a run stood ({type(error).__name__}: {error}); to take its weights "
            "alone, add --finetune"
        ) from error
    return progress


def _begin_optimizer_anew(trainer: PolicyTrainer) -> None:
    """Forget all moments, those of steps that a rollback takes back too; fp32 main weights follow the policy."""
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        part.optimizer.state.clear()
    trainer.after_weights_changed()


def _load_schedule(trainer: PolicyTrainer, saved: dict[str, Any], say: Callable[[str], None]) -> None:
    """Take the position from the checkpoint and the schedule from the flags, and say what is not as it was."""
    now = trainer.scheduler.state_dict()
    changed = [f"{name} was {saved[name]} and is {now[name]}" for name in _SCHEDULE if saved.get(name) != now[name]]
    if changed:
        say("the schedule goes on with other settings: " + ", ".join(changed))
    trainer.scheduler.num_steps = 0  # megatron-core adds the loaded position to the one that is there
    trainer.scheduler.load_state_dict(saved)


def _absent_parts(reader: RestrictedReader) -> set[str]:
    """Parts of the state that the checkpoint lawfully lacks.

    An NTP run leaves no reference: then the reference starts as a copy of what is loaded. A run that was stopped
    before its first update has no moments yet: then the optimizer starts anew.
    """
    stored = reader.read_metadata().state_dict_metadata
    marks = {"reference": "reference.", "optimizer": "optimizer.state.exp_avg"}
    return {part for part, mark in marks.items() if not any(key.startswith(mark) for key in stored)}
