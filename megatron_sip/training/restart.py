"""A worker group that torchrun started again goes on from what it saved before, whatever it began with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_sip.checkpoint.latest import LATEST, checkpoint_folder, newest_whole
from megatron_sip.checkpoint.retain import clean
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import load_run_config
from megatron_sip.errors import CheckpointError


def continued(config: Config, warn: Callable[[str], None]) -> Config:
    """The configuration of this start of the ranks, for the main rank.

    Under `--max-restarts` every start has the same command line, with `--load` of the weights that the first one began
    with. Once this launch has written a checkpoint, that is what a later start loads; damaged ones are passed over with
    a word to `warn`.

    Raises:
        CheckpointError: the folder of `--save` is damaged.
    """
    save = config.checkpoint.save
    if save is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    root = Path(save)
    try:
        if root.is_dir():
            clean(root)  # a kill between the two renames of a save leaves the named folder under another name
    except OSError as error:
        raise CheckpointError(f"cannot put --save {root} in order: {error}; mend its rights") from error
    iteration = newest_whole(root, warn)
    launched = psutil.Process(os.getppid()).create_time()
    if iteration is None or (root / LATEST).stat().st_mtime < launched:
        return config  # what is there is of an earlier run
    # The sizes of the model may have come from the folder of --load.
    model = load_run_config(checkpoint_folder(root, iteration) / "run_config.yaml").model
    return replace(config, model=model, checkpoint=replace(config.checkpoint, load=save, finetune=False))
