"""A Debian package that is fetched for the files inside it, and never installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from megatron_sip.errors import DataError


def unpack(package: str, scratch: Path, instead: str) -> Path:
    """Fetch the package with apt, which checks its signature, and unpack it; returns the folder of its root.

    `instead` tells what else one can do, as the end of a message.

    Raises:
        DataError: this is no Debian, or the package cannot be had.
    """
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise DataError(f"this machine has no apt-get and dpkg-deb to fetch {package} with; {instead}")
    _run(["apt-get", "download", "--quiet", package], scratch, package, instead)
    archives = list(scratch.glob(f"{package}_*.deb"))
    if len(archives) != 1:
        raise DataError(f"apt-get left {len(archives)} archives of {package} in {scratch}, expected one; {instead}")
    root = scratch / package
    _run(["dpkg-deb", "--extract", str(archives[0]), str(root)], scratch, package, instead)
    return root


def _run(command: list[str], folder: Path, package: str, instead: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DataError(
            f"{command[0]} cannot get {package} ({said}); run `apt-get update` or check the network, or {instead}"
        )
