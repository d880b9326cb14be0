"""The example's cluster branch on this machine: two nodes, stopping, dry runs. No server: a local classifier scores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from spawn import free_port
from tiny_corpus import make_corpus

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ["bash", str(ROOT / "examples" / "pretrain_sip_llama.sh")]
SMALL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
    "--seq-length 64 --suffix-length 16 --min-prefix-length 8 --global-batch-size 4 --micro-batch-size 1 "
    "--num-rollouts 3"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def environment(corpus: tuple[str, str], run_dir: Path, **more: str) -> dict[str, str]:
    """The variables of one node; nothing of the caller's own launch leaks in."""
    names = ("PATH", "HOME", "LANG", "LC_ALL", "VIRTUAL_ENV", "PYTHON", "TMPDIR")
    clean = {name: os.environ[name] for name in names if name in os.environ}
    return {
        **clean,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "MODEL": "llama-tiny",
        "DATA_PATH": corpus[0],
        "TOKENIZER_MODEL": corpus[1],
        "RUN_DIR": str(run_dir),
        "GPUS_PER_NODE": "1",
        **more,
    }


def test_two_launches_as_two_nodes_train_two_steps(corpus: tuple[str, str], tmp_path: Path) -> None:
    port = str(free_port())
    flags = [*SMALL, "--train-iters", "2", "--metrics-file", str(tmp_path / "metrics.jsonl")]
    nodes = [
        subprocess.Popen(
            [*SCRIPT, *flags],
            env=environment(
                corpus, tmp_path / "run", NNODES="2", NODE_RANK=str(rank), MASTER_PORT=port, TP="2", SAVE_INTERVAL="1"
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)[-6000:]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    assert sum(line["pairs/valid"] for line in lines) > 0
    assert all(line["loss"] > 0 for line in lines if line["pairs/valid"])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "2"
    assert "iteration        2/" in outputs[0]
    assert "iteration        2/" not in outputs[1]  # only the main rank prints


def family(pid: int) -> set[int]:
    """The process and everything that descends from it."""
    found, queue = {pid}, [pid]
    while queue:
        listing = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(queue.pop())], capture_output=True, text=True, check=False
        )
        children = {int(word) for word in listing.stdout.split()} - found
        found |= children
        queue += children
    return found


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_and_saves(corpus: tuple[str, str], tmp_path: Path, number: int) -> None:
    metrics = tmp_path / "metrics.jsonl"
    node = subprocess.Popen(
        # As at a terminal: a test run in the background would hand on an ignored SIGINT, which bash cannot trap.
        ["env", "--default-signal=INT", *SCRIPT, *SMALL, "--train-iters", "100000", "--metrics-file", str(metrics)],
        # A save at every step, so that the helper of the first save is there when the signal comes.
        env=environment(corpus, tmp_path / "run", MASTER_PORT=str(free_port()), TP="1", SAVE_INTERVAL="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert node.poll() is None, node.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.2)
    members = family(node.pid)
    assert len(members) > 2
    node.send_signal(number)
    output = node.communicate(timeout=120)[0]
    assert node.returncode == 128 + number, output[-3000:]
    assert not [pid for pid in members if runs(pid)]
    assert "megatron_sip: error" not in output, output[-3000:]
    saved = (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()
    assert int(saved) == json.loads(metrics.read_text().splitlines()[-1])["iteration"]


def dry_run(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    names = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [*SCRIPT, "--seed", "7"],
        env={**names, "DRY_RUN": "1", **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_dry_run_prints_both_models_and_starts_nothing(tmp_path: Path) -> None:
    done = dry_run(tmp_path, JUDGE_API_KEY="sk-secret-key", NNODES="4", NODE_RANK="1", MASTER_ADDR="node0")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert len(commands) == 2
    for command, preset in zip(commands, ("llama-1.4b", "llama3-8b"), strict=True):
        assert f"--model-preset={preset}" in command
        assert "--nnodes 4 --node-rank 1 --master-addr node0 --master-port 29500" in command
        assert command.rstrip().endswith("--seed 7")
    assert "--tensor-model-parallel-size=8" in commands[1]
    assert "sk-secret" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rank", "serves"), [("0", True), ("1", False)])
def test_only_the_first_node_serves_the_judge(tmp_path: Path, rank: str, serves: bool) -> None:
    done = dry_run(
        tmp_path, MODEL="llama3.2-1b", NNODES="2", NODE_RANK=rank, MASTER_ADDR="node0", JUDGE_MODEL_DIR="/models/judge"
    )
    assert done.returncode == 0, done.stderr
    assert ("serve_vllm.py --model /models/judge --host node0" in done.stdout) == serves
    assert "--judge-url http://node0:8100/v1" in done.stdout


def test_a_rewriter_may_be_another_model_on_the_judges_server(tmp_path: Path) -> None:
    done = dry_run(tmp_path, MODEL="llama3.2-1b", JUDGE_URL="http://judge:8100/v1", REWRITER_MODEL="writer")
    assert done.returncode == 0, done.stderr
    assert "--rewriter-model writer" in done.stdout


def test_a_key_over_plain_http_is_allowed_in_the_check_as_in_the_run(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nexit 1\n')
    python.chmod(0o755)
    run = {"DATA_PATH": "corpus", "TOKENIZER_MODEL": "tokenizer", "RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        [*SCRIPT, "--allow-insecure-judge"],
        env={"PATH": os.environ["PATH"], "PYTHON": str(python), "JUDGE_URL": "http://judge:8100/v1", **run},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "check_server.py" in call
    assert "--allow-insecure-judge" in call


def test_missing_data_is_named(tmp_path: Path) -> None:
    done = dry_run(tmp_path, DRY_RUN="0", MODEL="llama-1.4b")
    assert done.returncode != 0
    assert "DATA_PATH is not set" in done.stderr


def test_unknown_model_names_the_recipes(tmp_path: Path) -> None:
    done = dry_run(tmp_path, MODEL="llama-1.4x")
    assert done.returncode != 0
    assert "llama-1.4b" in done.stderr
