"""Our own checkpoints: megatron-core's distributed format, complete before it is named.

    <save>/iter_0000020/            .metadata, *.distcp, common.pt, run_config.yaml
    <save>/latest_checkpointed_iteration.txt

A checkpoint is written into `iter_0000020.incomplete`, flushed, renamed, and only then named in the latest
file, so that neither a crash nor a full disk can make a half-written one the newest.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sip.checkpoint.latest import LATEST, checkpoint_folder, first_line, latest_iteration
from megatron_sip.checkpoint.progress import Progress, from_state, to_state
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import save_run_config
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.world import World
from megatron_sip.training.step import PolicyTrainer

FORMAT_VERSION = 1
_READ_ERRORS = (OSError, EOFError, KeyError, ValueError, RuntimeError)
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


def save(config: Config, world: World, trainer: PolicyTrainer, progress: Progress) -> Path:
    """Write a checkpoint; all ranks call it together.

    Returns:
        Its folder.

    Raises:
        CheckpointError: the folder cannot be written; an earlier checkpoint stays intact.
    """
    if config.checkpoint.save is None:
        raise CheckpointError("no folder to save to; give --save")
    root = Path(config.checkpoint.save)
    final = checkpoint_folder(root, progress.iteration)
    partial = final.with_name(final.name + ".incomplete")
    _on_main(world, lambda: _fresh_folder(partial))
    state = _state(trainer, loading=False)
    state.update(
        format_version=FORMAT_VERSION,
        **to_state(progress),
        scheduler=trainer.scheduler.state_dict(),
        reference_steps=trainer.reference.optimizer_steps if trainer.reference else 0,
        torch_rng=torch.get_rng_state(),
    )
    failure = None
    try:
        with _stop_signals_held():
            dist_checkpointing.save(state, str(partial), validate_access_integrity=True)
    except (OSError, RuntimeError, CheckpointException) as error:
        failure = f"cannot write {partial}: {first_line(error)}; free space or choose another --save"
    _agree(world, failure)
    _on_main(world, lambda: _publish(config, partial, final, progress.iteration))
    return final


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Let stop signals wait until the files are written.

    megatron-core keeps a helper process from its first save on. It inherits this mask, so that a SIGTERM to the
    whole process group, as torchrun sends it, does not end it before the last save.
    """
    resource_tracker.ensure_running()  # starting it later would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _on_main(world: World, action: Any) -> None:
    """Run `action` on the main rank; its failure is raised on all ranks."""
    failure = None
    if world.is_main:
        try:
            action()
        except OSError as caught:
            failure = f"cannot write the checkpoint: {caught}; check the folder of --save"
    _agree(world, failure)


def _agree(world: World, failure: str | None) -> None:
    """Raise the first failure, by rank, on all ranks alike."""
    failures: list[str | None] = [None] * world.size
    dist.all_gather_object(failures, failure, group=world.control_group)
    first = next((item for item in failures if item is not None), None)
    if first is not None:
        raise CheckpointError(first)


def _fresh_folder(partial: Path) -> None:
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(config: Config, partial: Path, final: Path, iteration: int) -> None:
    """Flush, rename, and only then name the checkpoint."""
    save_run_config(config, partial / "run_config.yaml")
    for file in (*sorted(partial.rglob("*")), partial):
        _fsync(file)
    # One of the same iteration stays until the new one is named: a crash in between must not leave nothing.
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _fsync(final.parent)
    latest = final.parent / LATEST
    fresh = latest.with_suffix(".tmp")
    fresh.write_text(f"{iteration}\n")
    _fsync(fresh)
    fresh.replace(latest)
    _fsync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def load(root: Path, trainer: PolicyTrainer, say: Callable[[str], None], *, weights_only: bool) -> Progress:
    """Load the newest checkpoint under `root` into the trainer; all ranks call it together.

    `weights_only` takes the policy alone (`--finetune`): the optimizer, the schedule and the position start anew.
    `say` hears of everything that is not simply what the checkpoint holds.

    Raises:
        CheckpointError: none is there, it is damaged, or it belongs to a model of another shape.
    """
    iteration = latest_iteration(root)
    if iteration is None:
        raise CheckpointError(f"--load {root}: no {LATEST} there; name a folder that --save wrote")
    folder = checkpoint_folder(root, iteration)
    wanted = _state(trainer, loading=True, with_training=not weights_only)
    try:
        _require_known_version(folder)
        absent = set() if weights_only else _absent_parts(folder)
        state = dist_checkpointing.load({key: wanted[key] for key in wanted.keys() - absent}, str(folder))
    except (*_READ_ERRORS, CheckpointException, dist_checkpointing.core.CheckpointingException) as error:
        raise CheckpointError(
            f"--load {folder} does not fit this run: {first_line(error)}; the model flags must be those in its "
            "run_config.yaml, and its files complete"
        ) from error
    trainer.policy.load_state_dict(state["model"], strict=True)
    if weights_only:
        trainer.after_weights_changed()
        if trainer.reference:
            say("the reference policy starts as a copy of the policy")
        return Progress(0, 0, {})
    if "optimizer" in absent:
        say(f"{folder} holds no optimizer state; the optimizer starts anew")
        trainer.after_weights_changed()
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
    return from_state(state)


def _require_known_version(folder: Path) -> None:
    """Refuse a format of later days before its tensors are looked at."""
    version = dist_checkpointing.load_common_state_dict(str(folder)).get("format_version", FORMAT_VERSION)
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"--load {folder} has format {version} of a newer megatron_sip (this one knows {FORMAT_VERSION}); upgrade"
        )


def _load_schedule(trainer: PolicyTrainer, saved: dict[str, Any], say: Callable[[str], None]) -> None:
    """Take the position from the checkpoint and the schedule from the flags, and say what is not as it was."""
    now = trainer.scheduler.state_dict()
    changed = [f"{name} was {saved[name]} and is {now[name]}" for name in _SCHEDULE if saved.get(name) != now[name]]
    if changed:
        say("the schedule goes on with other settings: " + ", ".join(changed))
    trainer.scheduler.load_state_dict(saved)


def _absent_parts(folder: Path) -> set[str]:
    """Parts of the state that the checkpoint lawfully lacks.

    An NTP run leaves no reference: then the reference starts as a copy of what is loaded. A run that was stopped
    before its first update has no moments yet: then the optimizer starts anew.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder))
    marks = {"reference": "reference.", "optimizer": "optimizer.state.exp_avg"}
    return {part for part, mark in marks.items() if not any(key.startswith(mark) for key in stored)}
