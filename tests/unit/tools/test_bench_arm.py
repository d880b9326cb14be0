"""The processes of a bench: they answer in turn, and one that ends says why."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from megatron_sip.errors import SipError
from tools.bench.arm import Arm, Others, mean_of

ROOT = Path(__file__).resolve().parents[3]
ANSWER = """
import sys
sys.path.insert(0, %r)
from tools.bench.arm import Line
line = Line.to(sys.argv[1])
for order in line.read():
    if order["number"] == 3:
        sys.exit("three is too many")
    line.write({"twice": 2 * order["number"]})
"""


def arm(script: str) -> Arm:
    return Arm("example", [sys.executable, "-c", script], dict(os.environ))


def test_an_arm_answers_until_it_ends_and_leaves_no_folder() -> None:
    with arm(ANSWER % str(ROOT)) as example:
        example.wait_ready()
        others = Others([example])
        assert [example.ask({"number": number})["twice"] for number in (1, 2)] == [2, 4]
        assert example.processor_seconds() > 0
        time.sleep(0.5)  # the kernel counts in hundredths of a second
        assert 0 <= others.cores() <= (os.cpu_count() or 1) + 0.5
        folder = Path(example._folder.name)
        assert folder.is_dir()
        with pytest.raises(SipError, match=r"(?s)arm example ended.*three is too many"):
            example.ask({"number": 3})
    assert not folder.exists()


def test_an_arm_that_never_gets_ready_says_why() -> None:
    with arm("raise SystemExit('no weights')") as example, pytest.raises(SipError, match="no weights"):
        example.wait_ready()


def test_steps_in_a_row_make_one_reply() -> None:
    steps = [{"seconds": s, "parts": {"train": s / 2}, "memory_gib": m} for s, m in ((1.0, 3.0), (3.0, 2.0))]
    assert mean_of(steps) == {"seconds": 2.0, "parts": {"train": 1.0}, "memory_gib": 3.0}
