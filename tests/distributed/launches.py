"""Launches of a command on the ranks of this machine, and all processes that came of one."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import psutil
from spawn import ROOT, worker_environment

from megatron_sip.ports import free_port

TOKEN = "SIP_LAUNCH"
"""Environment variable of all processes of a launch."""


class Agent(Protocol):
    """What starts the ranks, and starts them again."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        ...

    def kill(self) -> None:
        """End it, if it runs."""
        ...

    def wait(self, timeout: float) -> int | None:
        """Its exit status, when it has ended."""
        ...


class Launcher(Protocol):
    """Starts agents. `token` is in the environment of all their processes, `own` are pids that are none of a launch."""

    token: str
    own: set[int]

    def start(self, ranks: int, max_restarts: int, argv: Sequence[str], log: Path) -> Agent:
        """An agent with its ranks; `argv` begins with a script."""
        ...


class Torchrun:
    """torchrun as users call it; every rank imports everything anew."""

    def __init__(self) -> None:
        self.token, self.own = uuid.uuid4().hex, set[int]()

    def start(self, ranks: int, max_restarts: int, argv: Sequence[str], log: Path) -> Agent:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={free_port()}", f"--max-restarts={max_restarts}"]
        environment = worker_environment(**{TOKEN: self.token})
        with log.open("w") as out:
            return subprocess.Popen(
                [*command, *argv], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that only waits to be reaped does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def living(launcher: Launcher, agent: Agent) -> list[psutil.Process]:
    """All that runs with the token of a launcher, orphans included, but the agent and the launcher's own."""
    others = launcher.own | {agent.pid}
    return [one for one in psutil.process_iter() if one.pid not in others and _bears(one, launcher.token)]


def _bears(process: psutil.Process, token: str) -> bool:
    try:
        return process.environ().get(TOKEN) == token and alive(process)
    except psutil.Error:  # it ended meanwhile, or is another user's
        return False


class Launch:
    """An agent and whatever was started below it, found by the token in its environment, orphans included."""

    def __init__(self, launcher: Launcher, ranks: int, max_restarts: int, argv: Sequence[str], log: Path) -> None:
        self.log, self._launcher = log, launcher
        self.agent = launcher.start(ranks, max_restarts, argv, log)

    def processes(self) -> list[psutil.Process]:
        """What lives of the ranks and of what they started; not the agent."""
        return living(self._launcher, self.agent)

    def require_running(self) -> None:
        """Fail with the launch's own words if it ended by itself."""
        status = self.agent.poll()
        assert status is None, f"the launch ended by itself, with {status}:\n{self.said()}"

    def said(self) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-6000:]

    def wait(self, seconds: float) -> int:
        """The agent's exit status; nothing of the launch may be left then."""
        deadline = time.monotonic() + seconds
        while (status := self.agent.poll()) is None:
            assert time.monotonic() < deadline, f"the launch did not end within {seconds:.0f} s:\n{self.said()}"
            time.sleep(0.05)
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, f"orphans: {described(left)}"
        return status

    def end(self) -> None:
        """Leave nothing running, whatever happened."""
        self.agent.kill()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def described(processes: Sequence[psutil.Process]) -> list[str]:
    """What they are, for a message."""
    texts = []
    for process in processes:
        with suppress(psutil.Error):
            texts.append(f"{process.pid} (parent {process.ppid()}): {' '.join(process.cmdline())[:200]}")
    return texts


@contextmanager
def launched(
    launcher: Launcher, folder: Path, ranks: int, argv: Sequence[str], max_restarts: int = 0
) -> Iterator[Launch]:
    """A running launch with its output in `folder`; what is left of it ends with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("launch-*.log")))
    launch = Launch(launcher, ranks, max_restarts, argv, folder / f"launch-{number:02d}.log")
    try:
        yield launch
    finally:
        launch.end()
