"""Rollouts on a server: at three layouts as the policy's own engine, and in true steps of the method.

The server is a Llama in transformers behind vLLM's routes; `tests/integration/test_vllm_rollouts.py` has the real one.
"""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from commands import Command, run_commands
from fake_rollouts import FakeRolloutServer, make_llama
from fake_server import hang
from forks import run_checks
from test_stopped import DEADLINE, TP2, started, until
from tiny_corpus import make_corpus
from tiny_run import DATA, TRAINING

from megatron_sip.ports import free_port

LAYOUTS = (
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--pipeline-model-parallel-size 2 --rollout-transfer gloo",
    "",
    "--rollout-transfer gloo",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a random Llama, and a corpus."""
    folder = tmp_path_factory.mktemp("rollouts")
    make_corpus(folder / "data")
    make_llama(folder / "hf")
    return folder


def flags(root: Path, *urls: str) -> list[str]:
    """Of a run on that corpus that starts with that Llama."""
    own = ["--load", str(root / "hf"), "--data-path", str(root / "data" / "corpus_text_document")]
    own += ["--tokenizer-model", str(root / "data" / "tokenizer"), *DATA, *TRAINING, "--rollout-engine", "vllm"]
    return [*own, "--rollout-url", *urls, "--rollout-weights-dir", str(root / "weights")]


def test_both_engines_write_the_same(root: Path, tmp_path: Path) -> None:
    with FakeRolloutServer(root / "hf") as server:
        cases = [{"argv": [*flags(root, server.url), *more.split()], "port": free_port()} for more in LAYOUTS]
        (tmp_path / "cases.json").write_text(json.dumps(cases))
        run_checks("check_rollout_server.py", 2, str(tmp_path / "cases.json"))
        assert len(set(server.checksums)) == 3, "three different weights were there"
        assert server.receptions == len(server.reloads), "half of the layouts send them over a connection"
    assert list((root / "weights").iterdir()) == []


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_of_the_method(root: Path, tmp_path: Path) -> None:
    """Greedy rollouts of the policy by itself and by two servers train alike; a stale server is left out, and told."""
    greedy = "--temperature 0 --num-rollouts 1 --train-iters 3 --lr 1e-2 --tensor-model-parallel-size 2".split()
    with FakeRolloutServer(root / "hf") as one, FakeRolloutServer(root / "hf") as two:
        two.ignores_reloads = True
        commands = []
        for name, engine in (("megatron", "megatron"), ("vllm", "vllm")):
            own = flags(root, one.url, two.url)
            if engine == "megatron":
                own = own[: own.index("--rollout-engine")]
            out = ["--metrics-file", str(tmp_path / f"{name}.jsonl"), "--sample-log", str(tmp_path / f"{name}-s.jsonl")]
            commands.append(Command(name, [*own, *greedy, *out], str(tmp_path / "none")))
        stale = [*flags(root, two.url), *greedy]
        commands.append(Command("stale", stale, str(tmp_path / "none")))
        outcomes = run_commands(commands, 2, tmp_path / "cases")
        assert len(set(one.checksums)) == 3
        assert one.version.endswith("-3")
        salts = {body["cache_salt"] for _, body in two.requests if "cache_salt" in body}
        assert len(salts) == 2, "it has the weights of the first step of both runs, and is asked for nothing later"
        assert all(salt.endswith("-1") for salt in salts)
    for name in ("megatron", "vllm"):
        assert [rank.status for rank in outcomes[name]] == [0, 0], outcomes[name][0].stdout + outcomes[name][0].stderr
    said = outcomes["vllm"][0].stdout
    assert said.count("is not used: it has not the new weights") == 1
    mine, served = (lines_of(tmp_path / f"{name}-s.jsonl") for name in ("megatron", "vllm"))
    assert [record["candidates"] for record in served] == [record["candidates"] for record in mine]
    steps = lines_of(tmp_path / "vllm.jsonl")
    assert [step["rollout/servers_behind"] for step in steps] == [0, 1, 1]
    for step, wanted in zip(steps, lines_of(tmp_path / "megatron.jsonl"), strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert step["time/rollout_push"] > 0
        assert step["time/rollout_probe"] > 0
        assert step["rollout/tokens_per_second"] == pytest.approx(4 * 16 / step["time/rollout_write"], rel=1e-3)
    assert [rank.status for rank in outcomes["stale"]] == [2, 2]
    told = "".join(rank.stdout + rank.stderr for rank in outcomes["stale"])
    ends = [line for line in told.splitlines() if "megatron_sip: error:" in line]
    assert len(ends) == 1
    assert "has not the new weights" in ends[0]


@pytest.mark.nightly
@pytest.mark.parametrize("transfer", ["folder", "gloo"])
def test_a_run_waits_for_its_rollout_server_and_can_be_stopped_meanwhile(
    root: Path, tmp_path: Path, transfer: str
) -> None:
    """It goes away, comes back with other weights, gets those of the run again; then it hangs, and the run is told."""
    saved, log, metrics = tmp_path / "saved", tmp_path / "output.txt", tmp_path / "metrics.jsonl"
    first = FakeRolloutServer(root / "hf")

    def steps() -> int:
        return len(lines_of(metrics)) if metrics.exists() else 0

    with first:
        own = [
            *flags(root, first.url),
            *TP2,
            "--rollout-transfer",
            transfer,
            "--train-iters",
            "1000",
            "--lr-decay-iters",
            "1000",
        ]
        # The wait is longer than the deadline of its stage, which must not take it for a hang.
        own += ["--save", str(saved), "--metrics-file", str(metrics), "--stage-timeout", "480", "rollout=10"]
        with started(log, *own) as run:
            until(lambda: steps() >= 1, run, "the first step")
            first.close()
            until(lambda: "> paused: no server of --rollout-url" in log.read_text(), run, "word of the wait")
            time.sleep(12)
            assert run.poll() is None, log.read_text()[-3000:]
            with FakeRolloutServer(root / "hf", port=first.port) as second:
                reached = steps()
                until(lambda: steps() > reached + 1, run, "the steps behind the wait")
                assert second.version != "default"
                second.fault_every_time = hang
                until(lambda: second.in_flight > 0, run, "a call that hangs")
                began = time.monotonic()
                run.send_signal(signal.SIGTERM)
                run.wait(DEADLINE)
                took = time.monotonic() - began
    said = log.read_text()
    whole = lines_of(metrics)[-1]["iteration"]
    assert f"stopping after iteration {whole}: SIGTERM; the step in stage rollout of iteration {whole + 1} (" in said
    assert (saved / "latest_checkpointed_iteration.txt").read_text().split() == [str(whole)]
    assert took < 20
    assert list((root / "weights").iterdir()) == [], "the weights that were sent are gone"
