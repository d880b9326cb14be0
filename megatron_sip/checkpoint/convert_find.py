"""Which of our checkpoints a conversion reads, and with what settings it was made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_sip.checkpoint.latest import checkpoint_folder, newest_whole, whole_problem
from megatron_sip.checkpoint.manifest import RUN_CONFIG
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import load_run_config
from megatron_sip.errors import CheckpointError


def find_checkpoint(root: Path, iteration: int | None, say: Callable[[str], None]) -> tuple[Path, int]:
    """Folder and iteration of the wanted checkpoint under `root`, whose files were all checked.

    iteration  None wants the newest that is whole
    say        hears of damaged ones that were passed over

    Raises:
        CheckpointError: it is not there, or not whole.
    """
    if iteration is None:
        newest = newest_whole(root, say)
        if newest is None:
            raise CheckpointError(f"--load-dir {root} holds no checkpoint; name a folder that --save wrote")
        return checkpoint_folder(root, newest), newest
    folder = checkpoint_folder(root, iteration)
    problem = whole_problem(folder)
    if problem is not None:
        raise CheckpointError(f"{folder} is no whole checkpoint: {problem}; choose another --iteration")
    return folder, iteration


def run_config_of(folder: Path) -> Config:
    """The settings that the checkpoint was saved with.

    Raises:
        CheckpointError: there are none.
        ConfigError: they cannot be read.
    """
    file = folder / RUN_CONFIG
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; without it the architecture is not known")
    return load_run_config(file)
