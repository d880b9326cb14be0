"""Ranks that die, raise, hang or lose their launcher: the others are gone in time, one message names the fault, and
`torchrun --max-restarts` goes on from the checkpoint."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from faulty import Faulty, launched
from launches import Torchrun, alive
from spawn import complaint, torchrun
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

GONE_SECONDS = 30.0
HANG = 6.0
TP2 = ("--tensor-model-parallel-size", "2")
PP2 = ("--pipeline-model-parallel-size", "2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data_path, tokenizer = make_corpus(tmp_path_factory.mktemp("data"))
    return ["--data-path", data_path, "--tokenizer-model", tokenizer]


def flags_of(corpus: list[str], saved: Path, *flags: str) -> list[str]:
    """A long run that saves at every iteration and goes on from where it saved."""
    own = ["--save", str(saved), "--load", str(saved), "--save-interval", "1", "--train-iters", "1000"]
    return [*MODEL, *DATA, *TRAINING, *corpus, *own, *flags]


def fault(do: str, rank: int, stage: str, iteration: int) -> list[dict[str, Any]]:
    """One start of the ranks with one run, in which one rank has this fault."""
    return [{"faults": [{"do": do, "rank": rank, "stage": stage, "iteration": iteration}]}]


def messages(said: str) -> list[str]:
    return re.findall(r"^megatron_sip: error: .*$", said, re.M)


def end_of(launch: Faulty, attempt: int, within: float) -> str:
    """The one message of a start, whose ranks must be gone that soon after its fault."""
    seconds = launch.gone(attempt, launch.fault_time(attempt), within)
    said = messages(launch.said())
    assert len(said) == attempt + 1, said
    print(f"start {attempt}: all ranks gone {seconds:.1f} s after the fault: {said[-1]}")
    return said[-1]


def resumed_at(launch: Faulty) -> list[int]:
    return [int(number) for number in re.findall(r"> resumed from .* at iteration (\d+) ", launch.said())]


def test_no_rank_waits_for_ever(tmp_path: Path, corpus: list[str]) -> None:
    attempts = [
        fault("SIGKILL", 1, "rollout", 3),
        fault("SIGSTOP", 0, "train", 4),
        fault("raise", 1, "backward", 5),
        fault("nothing", 0, "rollout", 6),
    ]
    flags = flags_of(corpus, tmp_path / "saved", *TP2, "--stage-timeout", "480", f"train={HANG}")
    with launched(Torchrun(), tmp_path, 2, attempts, flags) as launch:
        killed = end_of(launch, 0, GONE_SECONDS)
        assert re.search(r"rank 1 is gone \(process \d+ on .* was killed or crashed\), last heard of in stage ", killed)

        stopped = end_of(launch, 1, HANG + GONE_SECONDS)
        assert "no progress for 6 s in stage train of iteration 4 (samples 12 to 15): rank 0 (process" in stopped
        assert "is stopped (SIGSTOP)" in stopped

        raised = end_of(launch, 2, GONE_SECONDS)
        assert "rank 1 failed in stage train of iteration 5 (samples 16 to 19) with MemoryError: the made-up" in raised

        # The launcher is killed: its ranks and what they started end by themselves.
        launch.fault_time(3)
        family = launch.processes()
        assert len(family) >= 2
        began = time.monotonic()
        launch.agent.kill()
        launch.until(lambda: not any(alive(one) for one in family), "the end of the orphans", GONE_SECONDS)
        print(f"orphans gone after {time.monotonic() - began:.1f} s")
        assert "the launcher ended without a word" in launch.said()
        assert launch.processes() == []
        assert resumed_at(launch) == [2, 3, 4]
        own = re.findall(r"> restart (\d) of the ranks: this launch saved iteration (\d) in ", launch.said())
        assert own == [("1", "2"), ("2", "3"), ("3", "4")]
        # Only the rank that raised shows where.
        assert launch.said().count("Traceback (most recent call last)") == 1


@pytest.mark.parametrize(
    "rendezvous", [(), ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0")], ids=["static", "c10d"]
)
def test_what_a_launch_notes_outlives_its_ranks(tmp_path: Path, rendezvous: tuple[str, ...]) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import os, sys\n"
        "from megatron_sip.parallel.meeting import launch_store\n"
        "start = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "print('start', start, 'reads', launch_store().compare_set('note', '', start).decode(), flush=True)\n"
        "sys.exit(start == '0')\n"
    )
    result = torchrun(1, "--max-restarts=1", *rendezvous, str(script))
    assert result.returncode == 0, complaint(result)
    assert re.findall(r"start (\d) reads (\d)", result.stdout) == [("0", "0"), ("1", "0")]


@pytest.mark.nightly
def test_hangs_are_told_apart(tmp_path: Path, corpus: list[str]) -> None:
    attempts = [
        fault("sleep", 1, "backward", 3),
        fault("lonely collective", 0, "train", 4),
        fault("SIGTERM and sleep", 1, "optimizer", 5),
        fault("SIGKILL", 0, "save", 5),
        fault("hold Python's lock", 1, "report", 6),
        fault("sleep", 0, "report", 6),
    ]
    limits = ("--stage-timeout", "480", f"train={HANG}", f"report={HANG}", "--sigterm-grace", "0")
    with launched(Torchrun(), tmp_path, 2, attempts, flags_of(corpus, tmp_path / "saved", *PP2, *limits)) as launch:
        asleep = end_of(launch, 0, HANG + GONE_SECONDS)
        assert re.search(r"no progress for 6 s in .*: rank 1 \(process .* is in .*fault_main.py:\d+ in commit", asleep)
        assert "in stage train of iteration 3 (samples 8 to 11)" in asleep
        assert "rank 1: what its threads do:" in launch.said()

        # The stages wait in different collectives; both are shown.
        apart = end_of(launch, 1, HANG + GONE_SECONDS)
        assert "every rank waits for another: rank 0 in stage train of iteration 4" in apart

        late = end_of(launch, 2, 10 + GONE_SECONDS)
        assert "the ranks did not agree to stop within 10 s of SIGTERM (--sigterm-grace 0 and 10)" in late
        assert ": rank 1 (process" in late

        end_of(launch, 3, GONE_SECONDS)

        stuck = end_of(launch, 4, HANG + GONE_SECONDS)
        assert re.search(r"no progress for 6 s in .*: rank 1 \(process .*\) does not answer, last heard of in ", stuck)

        asleep = end_of(launch, 5, HANG + GONE_SECONDS)
        assert "no progress for 6 s in stage report of iteration 6" in asleep
        assert launch.agent.wait(GONE_SECONDS) == 1
        assert launch.processes() == []
        assert resumed_at(launch) == [2, 3, 4, 4, 5]
        # What the ranks themselves exit with; torchrun tells of the last start.
        assert re.findall(r"exitcode *: (\d+)", launch.said())[-1] == "3"
