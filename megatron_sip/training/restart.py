"""A worker group that torchrun started again goes on from what it saved before, whatever it began with.

What stood in the folder of `--save` when the launch began is noted in the store of torchrun's agent, which outlives the
ranks: a checkpoint that is not in the note is of this launch. No clock of a file server has a say in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from megatron_sip.checkpoint.latest import (
    candidates,
    checkpoint_folder,
    newest_whole,
    same_folder,
    saved_iterations,
    written_at,
)
from megatron_sip.checkpoint.manifest import RUN_CONFIG, DamagedError, listed, require_bytes
from megatron_sip.checkpoint.retain import clean
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import load_run_config
from megatron_sip.errors import CheckpointError
from megatron_sip.parallel.meeting import launch_store


@dataclass(frozen=True)
class Start:
    """How a start of the ranks begins.

    config  its configuration
    named   the iteration to begin with in the folder of `--load`; None: what the latest file says
    among   the iterations there that may be loaded; None: all
    """

    config: Config
    named: int | None = None
    among: frozenset[int] | None = None

    def behind(self, iteration: int) -> frozenset[int]:
        """The checkpoints in the folder of `--save` that led to where the run stands; for the main rank.

        `iteration` is that of the loaded checkpoint. None of them where the run began with that of another folder.
        """
        load, save = self.config.checkpoint.load, self.config.checkpoint.save
        if load is None or iteration == 0 or not same_folder(load, save):
            return frozenset()
        # One of iteration 0 holds the policy alone, so there is no way back to it.
        return frozenset(candidates(Path(load), iteration, self.among)) - {0}


def continued(config: Config, say: Callable[[str], None]) -> Start:
    """How this start of the ranks begins, for the main rank.

    Every start has the same command line, be it by `--max-restarts` or for a node that came or left, with `--load` of
    the weights that the first one began with. Once this launch has written a checkpoint, that is what a later start
    loads. `say` hears which way was taken.

    Raises:
        CheckpointError: the folder of `--save` is damaged.
    """
    save = config.checkpoint.save
    if save is None or not _later(Path(save)):
        return Start(config)
    root, which = Path(save), f"restart {_start()} of the ranks" if _start() else "a new start of the ranks"
    try:
        if root.is_dir():
            clean(root)  # a kill between the two renames of a save leaves the named folder under another name
    except OSError as error:
        raise CheckpointError(f"cannot put --save {root} in order: {error}; mend its rights") from error
    own = _of_this_launch(root)
    # What an earlier run left is no way to go on, and may be damaged, unless the command line asks for it.
    goes_on = same_folder(root, config.checkpoint.load) and not config.checkpoint.finetune
    among = None if goes_on else frozenset(own)
    iteration = newest_whole(root, say, _listing_problem, candidates(root, among=among) if own else [])
    if iteration is None:
        say(f"{which}: this launch saved nothing in {root} yet, so they begin as at first")
        return Start(config)
    whose = "saved" if iteration in own else "found"
    say(f"{which}: this launch {whose} iteration {iteration} in {root}, so they go on from there")
    # The sizes of the model may have come from the folder of --load.
    model = load_run_config(checkpoint_folder(root, iteration) / RUN_CONFIG).model
    checkpoint = replace(config.checkpoint, load=save, finetune=False)
    return Start(replace(config, model=model, checkpoint=checkpoint), iteration, among)


def note_found(config: Config) -> None:
    """Note what stands in the folder of `--save` and is of no start of this launch, for the main rank, before any save.

    The first note stays.
    """
    save, store = config.checkpoint.save, launch_store()
    if save is None or store is None:
        return
    root = Path(save)
    own = _of_this_launch(root) if _start() else set()
    found = [(iteration, written) for iteration, written in _standing(root).items() if iteration not in own]
    store.compare_set(_key(root), "", json.dumps(found))


def _start() -> int:
    """How often torchrun has started the ranks again, without the times when only a node came or left."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _later(root: Path) -> bool:
    """Whether this is not the first start of its launch: by torchrun's count, or by the note of an earlier start."""
    return _start() > 0 or _found(root) is not None


def _of_this_launch(root: Path) -> set[int]:
    """Iterations under `root` that this launch has saved."""
    standing, found = _standing(root), _found(root)
    if found is not None:
        return {iteration for iteration, written in standing.items() if found.get(iteration) != written}
    # Killed before the note, or the store went with the node that held it. Both times are those of a rank's host.
    launched = psutil.Process(os.getppid()).create_time()
    return {iteration for iteration, written in standing.items() if written > launched}


def _standing(root: Path) -> dict[int, float]:
    """The checkpoints under `root`, with the times that their manifests tell."""
    return {iteration: written_at(checkpoint_folder(root, iteration)) for iteration in saved_iterations(root)}


def _found(root: Path) -> dict[int, float] | None:
    """What stood under `root` when this launch began; None if that was not noted."""
    store = launch_store()
    if store is None or not store.check([_key(root)]):
        return None
    return {int(iteration): float(written) for iteration, written in json.loads(store.get(_key(root)))}


def _key(root: Path) -> str:
    return f"found/{root.resolve()}"


def _listing_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint at a glance; all ranks together compare its checksums when they load it."""
    try:
        require_bytes(folder, listed(folder), [RUN_CONFIG])
    except DamagedError as error:
        return str(error)
    return None
