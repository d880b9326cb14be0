"""torch's elastic agent whose ranks are forked from a process that has imported everything: a start takes a second.

`fork_agent.py` reads orders from standard input, one JSON object a line: {"ranks", "max_restarts", "port", "out",
"err", "environment", "argv"}. `argv` is what torchrun would take: a script or `-m` and a module, then arguments. For
each order it forks an agent, writes the agent's process id, and later its exit status. The agent is the one that
torchrun uses; only the ranks are functions instead of commands.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# What the ranks would import: the product, and what it imports late.
PRELOADED = (
    *("megatron_sip.training.loop", "megatron.core.pipeline_parallel.schedules", "torch.distributed.checkpoint"),
    *("transformers.tokenization_utils_fast", "profanity_check", "tyro", "rich.table", "httpx"),
)

END_OF_RANKS = "== what torch's elastic agent says of its ranks:"


def rank_main(*argv: str) -> None:
    """One rank: the script or module as the interpreter would run it, with a fresh process's signal handlers."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if argv[0] == "-m":
            sys.argv = list(argv[1:])
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(argv), str(Path(argv[0]).parent)
            runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        # The agent's way to fetch the error of a function would keep it from standard error.
        traceback.print_exc()
        sys.exit(1)


def agent(order: dict[str, Any]) -> int:
    """As torchrun would: start the ranks, start them again, give up; the exit status."""
    os.environ.update(order["environment"])
    for number, file in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, number)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=order["ranks"],
        run_id="forked",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{order['port']}",
        rdzv_configs={"rank": 0},
        max_restarts=order["max_restarts"],
        start_method="fork",
    )
    try:
        elastic_launch(config, rank_main)(*order["argv"])
    except ChildFailedError as error:
        print(f"{END_OF_RANKS}\n{error}", file=sys.stderr, flush=True)
        return 1
    return 0


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            status = 1
            try:
                status = agent(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
