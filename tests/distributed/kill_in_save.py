"""The product, killed in the middle of the save of one iteration, as by SIGKILL from outside.

kill_in_save.py ITERATION FLAGS...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sip import pretrain


def main() -> int:
    from megatron_sip.checkpoint import writer

    fatal, write = f"iter_{int(sys.argv[1]):07d}.incomplete", writer.write_pieces

    def write_half(path: Path, pieces: Iterable[Any]) -> Any:
        if path.parent.name == fatal:
            every = list(pieces)
            write(path, islice(every, len(every) // 2))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, pieces)

    writer.write_pieces = write_half
    return pretrain.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
