"""A run that is told to stop: the last whole step is saved, all ranks end together, and nothing is left running."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from fake_server import FakeServer, hang
from faulty import launched
from forks import shared
from spawn import ROOT, free_port, worker_environment
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

DEADLINE = 120.0
TP2 = ("--tensor-model-parallel-size", "2")


def until(condition: Callable[[], bool], run: subprocess.Popen, what: str) -> None:
    """Poll until `condition` holds; the run must be alive all the while."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert run.poll() is None, f"the run ended while {what} was awaited"
        assert time.monotonic() < deadline, f"{what} did not come within {DEADLINE:.0f} s"
        time.sleep(0.05)


@contextmanager
def started(log: Path, *flags: str) -> Iterator[subprocess.Popen]:
    """The product at TP2 under torchrun; whatever of it is left is killed at the end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    launch += [f"--master-port={free_port()}", "-m", "megatron_sip.pretrain", *flags]
    with log.open("w") as out:
        run = subprocess.Popen(launch, cwd=ROOT, env=worker_environment(), stdout=out, stderr=out)
        family = [psutil.Process(run.pid)]
        try:
            yield run
        finally:
            family += [child for process in family if process.is_running() for child in process.children(True)]
            for process in family:
                if process.is_running():
                    process.kill()
            run.wait(30)


def test_sigterm_during_a_judge_wait_saves_the_last_whole_step(tmp_path: Path) -> None:
    data_path, tokenizer = make_corpus(tmp_path / "data")
    saved, log = tmp_path / "saved", tmp_path / "output.txt"
    flags = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer]
    flags += "--tensor-model-parallel-size 2 --train-iters 1000 --judge-reading logit --quality-weight 1".split()
    flags += ["--save", str(saved), "--metrics-file", str(tmp_path / "metrics.jsonl")]

    with FakeServer() as server, started(log, *flags, "--judge-url", server.url) as run:
        until(lambda: "iteration        1/" in log.read_text(), run, "the first step")
        server.fault_every_time = hang
        until(lambda: server.in_flight >= 8, run, "a judge wait")
        ranks = psutil.Process(run.pid).children(recursive=True)
        assert len(ranks) >= 2
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        status = run.wait(DEADLINE)
        took = time.monotonic() - began
        left = [process for process in ranks if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        assert server.in_flight == 0, "a call outlived the run"
    said = log.read_text()
    print(f"torchrun ended {took:.1f} s after SIGTERM with status {status}")
    assert left == [], "orphans"
    # torchrun reports the signal that it was sent, whatever the ranks' own status is.
    assert status != 0
    assert took < 20
    whole = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"stopping after iteration {whole}: SIGTERM; the step in stage judge of iteration {whole + 1} (" in said
    assert (saved / "latest_checkpointed_iteration.txt").read_text().split() == [str(whole)]
    assert [path.name for path in saved.glob("iter_*")] == [f"iter_{whole:07d}"]
    # torchrun shows its own frames; ours show none.
    assert re.search(r'File ".*megatron_sip', said) is None, said[-3000:]


def test_a_step_is_finished_in_the_grace_or_discarded_and_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    data_path, tokenizer = make_corpus(tmp_path / "data")
    saved = tmp_path / "saved"
    flags = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer, *TP2]
    flags += ["--train-iters", "1000", "--save", str(saved), "--load", str(saved)]
    runs = [
        {
            "slow": {"decode": 0.2},  # a rollout takes three seconds
            "faults": [{"do": "SIGTERM", "rank": 1, "stage": "rollout", "iteration": 3}],
            "flags": ["--sigterm-grace", "2"],
        },
        {
            "slow": {"backward": 1.0},
            "faults": [{"do": "SIGTERM", "rank": 0, "stage": "backward", "iteration": 4}],
        },
        {
            "slow": {"backward": 3.0},
            "faults": [{"do": "SIGTERM twice", "rank": 1, "stage": "backward", "iteration": 5}],
            "flags": ["--sigterm-grace", "60"],
        },
    ]
    with launched(shared(), tmp_path / "run", 2, [runs], flags) as launch:
        status = launch.agent.wait(2 * DEADLINE)
        seconds = launch.ended_at() - launch.fault_time(0)
        assert launch.processes() == []
    said = launch.said()
    # Only one rank was signalled, and all ended alike.
    for rank in (0, 1):
        assert (launch.folder / f"0.{rank}.status").read_text().split() == ["0", "0"]
    assert "stopping after iteration 2: a signal to another rank; the step in stage rollout of iteration 3 (" in said
    assert "stopping after iteration 4: SIGTERM\n" in said
    assert [int(number) for number in re.findall(r"> resumed from .* at iteration (\d+) ", said)] == [2, 4]
    assert status == 1
    assert said.count("megatron_sip: error: a second SIGTERM: the run ends at once, nothing more is saved") == 1
    assert set(re.findall(r"exitcode *: (\d+)", said)) == {"143"}
    assert (saved / "latest_checkpointed_iteration.txt").read_text().split() == ["4"]
    print(f"ended {seconds - 1.5:.1f} s after the second SIGTERM, torchrun's own end included")
    assert seconds < 1.5 + 10


@pytest.mark.parametrize(
    ("layout", "slow_from", "most"),
    [
        # Given up before the next micro-batch.
        pytest.param(TP2, 3, 3 + 10, id="TP2"),
        # Given up behind the pass of 15 s: the one of iteration 2 has told how long that takes.
        pytest.param(("--pipeline-model-parallel-size", "2"), 2, 15 + 10, id="PP2", marks=pytest.mark.nightly),
    ],
)
def test_a_signal_early_in_a_train_stage_that_outlasts_the_grace_loses_nothing(
    tmp_path: Path, layout: tuple[str, str], slow_from: int, most: float
) -> None:
    """Four micro-batches of 3 s each; the ranks must agree within 12 s where they can."""
    data_path, tokenizer = make_corpus(tmp_path / "data")
    saved = tmp_path / "saved"
    flags = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer, *layout]
    flags += ["--train-iters", "1000", "--micro-batch-size", "1", "--save", str(saved), "--sigterm-grace", "2"]
    run = {
        "slow": {"backward": 3.0},
        "slow_from": slow_from,
        "faults": [{"do": "SIGTERM", "rank": 1, "stage": "backward", "iteration": 3}],
    }
    with launched(shared(), tmp_path / "run", 2, [[run]], flags) as launch:
        status = launch.agent.wait(2 * DEADLINE)
        seconds = launch.ended_at() - launch.fault_time(0)
        assert launch.processes() == []
    said = launch.said()
    assert status == 0, said[-3000:]
    for rank in (0, 1):
        assert (launch.folder / f"0.{rank}.status").read_text().split() == ["0"]
    assert "stopping after iteration 2: a signal to another rank; the step in stage train of iteration 3 (" in said
    assert (saved / "latest_checkpointed_iteration.txt").read_text().split() == ["2"]
    print(f"ended {seconds:.1f} s after SIGTERM")
    assert seconds < most
