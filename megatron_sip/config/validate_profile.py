"""The trace of `--profile`: whether it has steps, ranks and a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sip.config.fields import flag_of
from megatron_sip.config.groups import Config, LoggingConfig

_OF_A_TRACE = ("profile_step_start", "profile_step_end", "profile_ranks", "profile_dir")


def profile_folder(config: Config) -> Path | None:
    """Where the files go: `--profile-dir`, or as in Megatron `--tensorboard-dir`, or `profile` in that of `--save`."""
    logging, save = config.logging, config.checkpoint.save
    folder = logging.profile_dir or logging.tensorboard_dir
    if folder is not None:
        return Path(folder)
    return None if save is None else Path(save) / "profile"


def profile_problems(config: Config, world_size: int) -> Iterator[str]:
    """A sentence for each setting of a trace that cannot be meant."""
    logging = config.logging
    if not logging.profile:
        default = LoggingConfig()
        for name in _OF_A_TRACE:
            if getattr(logging, name) != getattr(default, name):
                yield f"{flag_of(name)} is given without --profile, which switches the trace on"
        return
    start, end, iterations = logging.profile_step_start, logging.profile_step_end, config.training.train_iters
    if start >= end:
        yield (
            f"--profile-step-start {start} is not below --profile-step-end {end}; the iterations behind the first, up "
            "to the second, are traced"
        )
    elif start >= iterations:
        yield (
            f"--profile-step-start {start} lies beyond --train-iters {iterations}, so that nothing would be traced; "
            "lower it"
        )
    ranks = " ".join(str(rank) for rank in logging.profile_ranks)
    strange = [str(rank) for rank in logging.profile_ranks if not 0 <= rank < world_size]
    if not ranks:
        yield "--profile-ranks names no rank; name some, or leave it out for rank 0"
    if strange:
        yield (
            f"--profile-ranks {ranks}: {' '.join(strange)} of them not among the {world_size} launched ranks; use "
            f"0 to {world_size - 1}"
        )
    if profile_folder(config) is None:
        yield "--profile has no folder for its files; name one with --profile-dir, --tensorboard-dir or --save"
