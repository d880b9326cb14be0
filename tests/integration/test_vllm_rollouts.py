"""Rollouts on the real vLLM: a policy at TP 2 sends it its weights, proves them, and gets its own tokens back."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, run_commands
from fake_rollouts import make_llama
from forks import run_checks
from rollout_fleets import fleet_of, until, weights
from served import served
from tiny_corpus import make_corpus
from tiny_run import DATA, TRAINING

from megatron_sip.ports import free_port
from megatron_sip.rollout import delivery
from megatron_sip.rollout.delivery import ByConnection, described
from megatron_sip.rollout.receiver import Tensors
from megatron_sip.rollout.transfer import Meeting, send

pytestmark = [pytest.mark.server, pytest.mark.nightly]  # a server of its own takes half a minute to start

CHECK = Path(__file__).resolve().parents[1] / "distributed" / "check_rollout_server.py"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, a random Llama with a tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("rollouts")
    _, tokenizer = make_corpus(folder / "data")
    make_llama(folder / "hf", hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=2)
    for file in Path(tokenizer).iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module", params=[1, 2], ids=lambda ranks: f"{ranks}-ranks")
def url(root: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Base URL (with /v1) of a rollout server in float32, tensor parallel over so many ranks."""
    own = ["--rollouts", "--dtype", "float32", "--max-model-len", "128", "--threads", "1"]
    own += ["--tensor-parallel-size", str(request.param)]
    with served(root / "hf", root / f"server{request.param}.log", *own) as found:
        yield found


def flags(root: Path, url: str) -> list[str]:
    own = ["--load", str(root / "hf"), "--data-path", str(root / "data" / "corpus_text_document")]
    own += ["--tokenizer-model", str(root / "data" / "tokenizer"), *DATA, *TRAINING, "--rollout-engine", "vllm"]
    return [*own, "--rollout-url", url, "--tensor-model-parallel-size", "2"]


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    call = urllib.request.Request(url.removesuffix("/v1") + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=120) as answer:
        return json.load(answer)


def checksums(url: str) -> dict[str, str]:
    return ask(url, "/weight_checker", {"action": "checksum"})["checksums"]


def test_both_engines_write_the_same(root: Path, url: str) -> None:
    before = checksums(url)
    sent = (["--sequence-parallel"], ["--rollout-transfer", "gloo"])
    cases = [{"argv": [*flags(root, url), *more], "port": free_port()} for more in sent]
    (root / "cases.json").write_text(json.dumps(cases))
    print(run_checks(str(CHECK), 2, str(root / "cases.json"), timeout=500))
    after = checksums(url)
    moved = [name for name in before if before[name] != after[name]]
    assert any(name.endswith("embed_tokens.weight") for name in moved)
    assert ask(url, "/weight_info")["weight_version"].endswith("-6")


def test_a_broken_transfer_leaves_a_server_that_takes_the_next(
    root: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it breaks: vLLM fuses some tensors, and takes its parameters apart while it loads."""

    def broken(meeting: Meeting, folder: Path, tensors: Tensors, *others: Any) -> None:
        send(meeting, folder, tensors[:sent], *others)

    gloo = ByConnection("gloo", torch.device("cpu"))
    with fleet_of(root / "hf", delivery=gloo, urls=(url,), timeout=60.0) as fleet:
        count = len(described(root / "hf"))
        fleet.submit_push(weights(root / "hf", "run-0")).result(60)
        wanted = checksums(url)
        for sent in (0, 1, 2, 4, 5, 6, 8, 9, 10, count - 1):
            monkeypatch.setattr(delivery, "send", broken)
            future = fleet.submit_push(weights(root / "hf", f"run-{sent + 1}"))
            until(lambda: fleet.waits_for, future)
            assert "did not come through" in str(fleet.waits_for)
            # An answer of a server that has nobody's weights: it lives.
            assert ask(url, "/v1/completions", {"model": "hf", "prompt": [1, 2], "max_tokens": 2})["choices"]
            monkeypatch.setattr(delivery, "send", send)
            future.result(60)
        assert checksums(url) == wanted


def test_steps_of_the_method(root: Path, url: str, tmp_path: Path) -> None:
    """Two steps with a local scorer; the server has other weights in each, those of the step."""
    metrics, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    own = [*flags(root, url), "--train-iters", "2", "--lr", "1e-2", "--metrics-file", str(metrics)]
    own += ["--sample-log", str(samples)]
    (outcomes,) = run_commands([Command("run", own, str(tmp_path / "none"))], 2, tmp_path / "cases").values()
    assert [rank.status for rank in outcomes] == [0, 0], outcomes[0].stdout + outcomes[0].stderr
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["pairs/valid"] == 4
        assert step["rollout/servers_behind"] == 0
        times = {name: step[name] for name in step if "rollout" in name and name.startswith(("time/", "rollout/"))}
        print(times)
    assert ask(url, "/weight_info")["weight_version"].endswith("-2")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    rollouts = [one for record in records for one in record["candidates"] if one["kind"] == "rollout"]
    assert [one["length"] for one in rollouts] == [16] * (2 * 4 * 3)
