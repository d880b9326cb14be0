"""Which checkpoint a run loads: the newest whole one, decided by all its ranks together."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch.distributed as dist

from megatron_sip.checkpoint.agree import from_main
from megatron_sip.checkpoint.latest import candidates, checkpoint_folder, newest_whole
from megatron_sip.checkpoint.manifest import DamagedError, Manifest, listed, require_bytes, share
from megatron_sip.parallel.world import World


def choose(
    root: Path,
    world: World,
    say: Callable[[str], None],
    on_progress: Callable[[], None] = lambda: None,
    *,
    named: int | None = None,
    among: Collection[int] | None = None,
) -> Path | None:
    """The folder of the newest whole checkpoint under `root`; all ranks call it together and get the same.

    Every rank reads a share of the files and compares their checksums.

    Args:
        say: hears of the damaged ones that were passed over.
        on_progress: called often while files are read, so that the time they take is no hang.
        named: the iteration to begin with; None takes that of the latest file.
        among: iterations that may be taken, on the main rank; None: all.

    Returns:
        None if there is none at all.

    Raises:
        CheckpointError: there are some and none is whole; a newer version wrote one; or it would run code.
    """
    iterations = from_main(world, lambda: candidates(root, named, among))
    chosen = newest_whole(root, say, lambda folder: _problem(folder, world, on_progress), iterations)
    return None if chosen is None else checkpoint_folder(root, chosen)


def _problem(folder: Path, world: World, on_progress: Callable[[], None]) -> str | None:
    """What is wrong with the folder, the same answer on all ranks."""
    listing = from_main(world, lambda: _listing(folder))
    if isinstance(listing, str):
        return listing
    names = list(share(listing, world.rank, world.size))
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, _changed(folder, listing, names, on_progress), group=world.control_group)
    return next((found for found in problems if found is not None), None)


def _listing(folder: Path) -> Manifest | str:
    """The manifest of a folder whose files have the right sizes, or what is wrong."""
    try:
        return listed(folder)
    except DamagedError as error:
        return str(error)


def _changed(folder: Path, manifest: Manifest, names: list[str], on_progress: Callable[[], None]) -> str | None:
    try:
        require_bytes(folder, manifest, names, on_progress)
    except DamagedError as error:
        return str(error)
    return None
