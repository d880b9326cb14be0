"""Launches whose ranks are forked from one process that has imported everything, `fork_agent.py`.

Most tests start their ranks so, since imports take ten seconds a launch; those of the start itself use torchrun.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
from launches import TOKEN, Agent, alive
from spawn import ROOT, complaint, worker_environment

from megatron_sip.ports import free_port


class _ForkedAgent:
    """An agent of `fork_agent.py`, whose exit status comes from there."""

    def __init__(self, pid: int, parent: subprocess.Popen) -> None:
        self.pid, self._parent = pid, parent
        self._process = psutil.Process(pid)
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None and not alive(self._process):
            self._status = int(_answer(self._parent))
        return self._status

    def kill(self) -> None:
        if alive(self._process):
            self._process.kill()
        while self.poll() is None:
            time.sleep(0.01)

    def wait(self, timeout: float) -> int | None:
        """The exit status; None if it still runs after so many seconds."""
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return status


class Forked:
    """Starts agents one after another; each must have ended before the next."""

    def __init__(self) -> None:
        self.token = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_agent.py"))],
            cwd=ROOT,
            env=worker_environment(**{TOKEN: self.token}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.own = {self._process.pid}

    def start(self, ranks: int, max_restarts: int, argv: Sequence[str], log: Path) -> Agent:
        """As `Launcher.start`, with one file for all output."""
        return self.order(ranks, argv, max_restarts=max_restarts, out=log, err=log)

    def order(
        self,
        ranks: int,
        argv: Sequence[str],
        *,
        out: Path,
        err: Path,
        max_restarts: int = 0,
        environment: Mapping[str, str] | None = None,
    ) -> _ForkedAgent:
        """An agent with its ranks, which write to `out` and `err`."""
        order = {"ranks": ranks, "max_restarts": max_restarts, "port": free_port(), "argv": list(argv)}
        order |= {"out": str(out), "err": str(err), "environment": dict(environment or {})}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return _ForkedAgent(int(_answer(self._process)), self._process)

    def close(self) -> None:
        """End the process; its agents must have ended."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _answer(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"{process.args} ended with {process.wait(10)}"
    return line


@cache
def shared() -> Forked:
    """One for all tests of this process."""
    launcher = Forked()
    atexit.register(launcher.close)
    return launcher


def forked(
    world_size: int, *command: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """As `spawn.torchrun`, without its imports: run `command` on `world_size` ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        agent = shared().order(world_size, command, out=out, err=err, environment=environment)
        family = psutil.Process(agent.pid)
        status = agent.wait(timeout)
        if status is None:
            for process in family.children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            agent.kill()
        said = [file.read_text(errors="replace") for file in (out, err)]
        assert status is not None, f"{command} took more than {timeout:.0f} s:\n{''.join(said)[-6000:]}"
    return subprocess.CompletedProcess(list(command), status, *said)


def run_checks(script: str, world_size: int, *arguments: str, timeout: float = 300) -> str:
    """Run a check script of this folder; its standard output. A failed rank fails the test with its words."""
    result = forked(world_size, str(Path(__file__).parent / script), *arguments, timeout=timeout)
    if result.returncode != 0:
        raise AssertionError(f"{script} {' '.join(arguments)} failed on {world_size} ranks:\n{complaint(result)}")
    return result.stdout
