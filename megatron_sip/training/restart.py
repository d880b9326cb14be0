"""A worker group that torchrun started again goes on from what it saved before, whatever it began with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import psutil

from megatron_sip.checkpoint.latest import LATEST, checkpoint_folder, latest_iteration
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import load_run_config


def continued(config: Config) -> Config:
    """The configuration of this start of the ranks, for the main rank.

    Under `--max-restarts` every start has the same command line, with `--load` of the weights that the first one began
    with. Once this launch has written a checkpoint, that is what a later start loads.

    Raises:
        CheckpointError: the folder of `--save` is damaged.
    """
    save = config.checkpoint.save
    if save is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    root = Path(save)
    iteration = latest_iteration(root)
    launched = psutil.Process(os.getppid()).create_time()
    if iteration is None or (root / LATEST).stat().st_mtime < launched:
        return config  # what is there is of an earlier run
    # The sizes of the model may have come from the folder of --load.
    model = load_run_config(checkpoint_folder(root, iteration) / "run_config.yaml").model
    return replace(config, model=model, checkpoint=replace(config.checkpoint, load=save, finetune=False))
