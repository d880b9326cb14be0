"""Several command lines of the product, one after another in the same ranks, since a launch takes ten seconds.

torchrun check_commands.py CASES.json OUT

CASES.json: [{"name", "argv", "environment", "port", "watch"}]; every case meets at a port of its own. Each rank writes
OUT/<name>.<rank>.json: {"status", "stdout", "stderr", "seconds", "watched"}. The output is caught at the file
descriptors, so that native libraries are caught too; "status" is the exit status, or the type of an exception that
left the entry. "watched" is the content of the folder "watch" behind the case.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from tree import digest_of_tree

from megatron_sip import pretrain


@contextmanager
def caught_output() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Files that take what is written to file descriptors 1 and 2."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = [os.dup(number) for number in (1, 2)]
        try:
            for number, file in ((1, out), (2, err)):
                os.dup2(file.fileno(), number)
            yield out, err
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def text_of(file: BinaryIO) -> str:
    """All that was written to it."""
    file.seek(0)
    return file.read().decode(errors="replace")


def call(argv: list[str]) -> int | str:
    """The exit status as the interpreter would give it, or the type of the exception that escaped."""
    try:
        return pretrain.main(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        traceback.print_exc()
        return type(error).__name__


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One command line with its own environment."""
    before = dict(os.environ)
    # Without torchrun's own store each case makes its own, so no key of the case before is found in it.
    os.environ.update(case["environment"], MASTER_PORT=str(case["port"]), TORCHELASTIC_USE_AGENT_STORE="False")
    began = time.monotonic()
    try:
        with caught_output() as (out, err):
            status = call(case["argv"])
            sys.stdout.flush()
            sys.stderr.flush()
            said = {"stdout": text_of(out), "stderr": text_of(err)}
    finally:
        os.environ.clear()
        os.environ.update(before)
    watched = digest_of_tree(Path(case["watch"]))
    return {"status": status, "seconds": time.monotonic() - began, "watched": watched, **said}


def main() -> None:
    cases, out = Path(sys.argv[1]), Path(sys.argv[2])
    for case in json.loads(cases.read_text()):
        result = run(case)
        (out / f"{case['name']}.{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
