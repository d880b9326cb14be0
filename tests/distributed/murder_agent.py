"""torch's elastic agent whose ranks are forked from a process that has imported everything: a start takes a second.

`murder_agent.py` reads orders from standard input, one JSON object a line: {"ranks", "max_restarts", "port", "log",
"argv"}. For each it forks an agent, writes the agent's process id, and later its exit status. The agent is the one
that torchrun uses; only the ranks are functions instead of commands.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import Any

import murder_main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# What the ranks would import: the product, and what it imports late.
PRELOADED = (
    *("megatron_sip.training.loop", "megatron.core.pipeline_parallel.schedules", "torch.distributed.checkpoint"),
    *("transformers.tokenization_utils_fast", "profanity_check", "tyro", "rich.table", "httpx"),
)


def rank_main(*argv: str) -> None:
    """One rank: `murder_main.py` with `argv`, and with the signal handlers of a fresh process."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = murder_main.run(list(argv))
    if status:
        sys.exit(status)


def agent(order: dict[str, Any]) -> int:
    """As torchrun would: start the ranks, start them again, give up; the exit status."""
    out = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for number, file in ((0, null), (1, out), (2, out)):
        os.dup2(file, number)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=order["ranks"],
        run_id="murder",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{order['port']}",
        rdzv_configs={"rank": 0},
        max_restarts=order["max_restarts"],
        start_method="fork",
    )
    try:
        elastic_launch(config, rank_main)(*order["argv"])
    except ChildFailedError as error:
        print(error, flush=True)
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
