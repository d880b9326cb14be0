"""A real vLLM server for tests, by the tool that users start one with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def served(model: Path, log: Path, *flags: str, startup_seconds: int = 500) -> Iterator[str]:
    """Base URL (with /v1) of a server of this model folder, which ends with the block; `flags` are of the tool."""
    tool = [sys.executable, str(ROOT / "tools" / "serve_vllm.py"), "--model", str(model), "--log-file", str(log)]
    server = subprocess.Popen(
        [*tool, "--startup-timeout", str(startup_seconds), *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()  # the tool prints it when the server is healthy, or ends
        assert url, f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}"
        yield url
    finally:
        server.terminate()
        server.wait(60)
