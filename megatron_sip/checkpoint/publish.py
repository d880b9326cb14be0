"""The files of a checkpoint on disk: written, flushed, described, and only then named."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sip.checkpoint.latest import next_time
from megatron_sip.checkpoint.manifest import (
    BACKENDS,
    FORMAT_VERSION,
    RUN_CONFIG,
    FileEntry,
    Manifest,
    file_entry,
    sync_folder,
    write_manifest,
)
from megatron_sip.checkpoint.naming import give_name, incomplete_folder, retire
from megatron_sip.checkpoint.plan import Piece, SavePlan
from megatron_sip.checkpoint.restricted import METADATA
from megatron_sip.config.groups import Config
from megatron_sip.config.run_config import save_run_config


@dataclass(frozen=True)
class Written:
    """What one rank has on disk: where its items lie, and its files."""

    results: list[WriteResult]
    files: dict[str, FileEntry]


def fresh_folder(folder: Path) -> None:
    """An empty folder, whatever was there."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def write_pieces(path: Path, pieces: Iterable[Piece]) -> Written:
    """Write one rank's data file and flush it to disk. The GIL is free while bytes are on their way."""
    results, crc, size = [], 0, 0
    with path.open("wb", buffering=0) as stream:
        for piece in pieces:
            with piece.content.getbuffer() as content:
                crc, size = zlib.crc32(content, crc), size + content.nbytes
                at = 0
                while at < content.nbytes:
                    at += stream.write(content[at:])
            piece.content.close()
            results.append(piece.result)
        os.fsync(stream.fileno())
    return Written(results, {path.name: FileEntry(size, crc)})


def publish(config: Config, root: Path, iteration: int, plan: SavePlan, written: list[Written]) -> str | None:
    """Describe what all ranks have written, name the checkpoint, and let go of those that retention gives up.

    The main rank's work, when the files of all ranks are on disk.

    Returns:
        What went wrong after the checkpoint was named, for the log.

    Raises:
        OSError: the checkpoint could not be finished; the one before is still the newest.
    """
    partial = incomplete_folder(root, iteration)
    if plan.metadata is None:
        raise ValueError("only the main rank publishes a checkpoint")
    plan.writer.finish(plan.metadata, [part.results for part in written])
    save_config(CheckpointingConfig("torch_dist", 1), str(partial))
    save_run_config(config, partial / RUN_CONFIG)
    files = {name: entry for part in written for name, entry in part.files.items()}
    for name in (METADATA, BACKENDS, RUN_CONFIG):
        with (partial / name).open("rb") as stream:
            os.fsync(stream.fileno())
        files[name] = file_entry(partial / name)
    write_manifest(partial, Manifest(FORMAT_VERSION, iteration, files, next_time(root)))
    sync_folder(partial)
    give_name(root, iteration)
    return retire(config.checkpoint, root, iteration)
