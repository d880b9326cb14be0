"""The server of the judge goes away in the midst of a run of two ranks: it waits, ends, or counts what is missing."""

from __future__ import annotations

import json
import math
import re
import signal
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import pytest
from aiohttp import web
from commands import Command, Outcome, run_commands
from fake_server import FakeServer, hang, labels_body, respond
from test_stopped import DEADLINE, TP2, started, until
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

VERDICTS = 4 * 12
"""Of a step: both orders of the pairs of four candidates, for four prefixes; fewer where two rollouts are the same."""
JUDGED = "--judge-reading logit --quality-weight 1 --classifier-weight 0 --judge-timeout 3 --judge-retries 0".split()
AWAY_SECONDS = 8.0


def base_flags(root: Path) -> list[str]:
    data_path, tokenizer = make_corpus(root / "data")
    return [*MODEL, *DATA, *TRAINING, *TP2, *JUDGED, "--data-path", data_path, "--tokenizer-model", tokenizer]


def lines_of(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def decided(request: web.Request) -> web.StreamResponse:
    """Probabilities that differ from question to question, so that no two candidates tie."""
    body = await request.json()
    share = (zlib.crc32(body["messages"][0]["content"].encode()) % 89 + 5) / 100
    names = [f"token_id:{token}" for token in body["logprob_token_ids"]]
    entries = [{"token": n, "logprob": math.log(p)} for n, p in zip(names, (share, 1 - share), strict=True)]
    return await respond(labels_body(entries))(request)


def test_a_run_waits_for_its_judge_and_goes_on_by_itself(tmp_path: Path) -> None:
    """It goes away twice: it comes back from the first outage, and in the second the run is told to stop."""
    saved, log, metrics = tmp_path / "saved", tmp_path / "output.txt", tmp_path / "metrics.jsonl"
    flags = [*base_flags(tmp_path), "--train-iters", "1000", "--save", str(saved), "--metrics-file", str(metrics)]
    # The wait is longer than the deadline of its stage, which must not take it for a hang.
    flags += ["--stage-timeout", "480", "judge=5"]

    def iteration() -> int:
        return len(lines_of(metrics)) if metrics.exists() else 0

    first = FakeServer()
    first.fault_every_time = decided
    with first, started(log, *flags, "--judge-url", first.url) as run:
        until(lambda: iteration() >= 1, run, "the first step")
        first.fault_every_time = hang
        until(lambda: first.in_flight >= 8, run, "a judge wait")
        whole = iteration()
        first.close()
        until(lambda: "> paused: " in log.read_text(), run, "the note of the outage")
        paused, since = iteration(), time.monotonic()
        until(lambda: time.monotonic() - since > AWAY_SECONDS, run, "the end of the outage")
        assert iteration() == paused == whole, "no step is made meanwhile"
        second = FakeServer(port=first.port)
        second.fault_every_time = decided
        with second:
            until(lambda: iteration() >= whole + 3, run, "three more steps")
            second.fault_every_time = hang
            until(lambda: second.in_flight >= 8, run, "another judge wait")
        until(lambda: log.read_text().count("> paused: ") == 2, run, "the note of the second outage")
        whole, began = iteration(), time.monotonic()
        run.send_signal(signal.SIGTERM)
        run.wait(DEADLINE)
        print(f"ended {time.monotonic() - began:.1f} s after SIGTERM in an outage")
        assert time.monotonic() - began < 20
    said = log.read_text()
    assert f"> paused: no server of --judge-url answers ({first.url}: " in said
    pause = re.search(r"> going on after a pause of (\d+) s\n", said)
    assert pause is not None
    assert int(pause[1]) >= AWAY_SECONDS - 2
    # Nothing was lost to the outage: every verdict of every step is there, and so is every pair.
    for line in lines_of(metrics):
        assert line["judge/asked"] > VERDICTS / 2
        assert (line["judge/missing"], line["judge/missing_share"]) == (0, 0)
        assert line["pairs/valid"] == 4
    assert (saved / "latest_checkpointed_iteration.txt").read_text().split() == [str(whole)]
    journal = "".join(segment.read_text() for segment in (saved / "journal").iterdir())
    assert '"missing"' not in journal
    assert "Traceback" not in said.split("torch/distributed/elastic")[0]


class Mortal:
    """A server that goes away for good with its call number `last`; `went` is when, by the monotonic clock."""

    def __init__(self, last: int) -> None:
        self.last, self.calls, self.went = last, 0, 0.0
        self.server = FakeServer()
        self._enough, self._over = Event(), Event()
        self._undertaker = Thread(target=self._bury, daemon=True)

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        if self.calls > self.last:
            self._enough.set()
            return await hang(request)
        return await decided(request)

    def _bury(self) -> None:
        self._enough.wait()
        if not self._over.is_set():
            self.server.close()
            self.went = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[Mortal]:
        with self.server:
            self.server.fault_every_time = self
            self._undertaker.start()
            yield self
            self._over.set()
            self._enough.set()
            self._undertaker.join()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[Outcome], Path, str]]:
    """By the setting: what the ranks did, their metrics, and the server's URL."""
    root = tmp_path_factory.mktemp("outage")
    base = base_flags(root)
    stop, skip = Mortal(last=int(2.5 * VERDICTS)), Mortal(last=int(2.5 * VERDICTS))
    with stop.running(), skip.running():
        servers = {"stop": stop.server.url, "skip": skip.server.url}
        flags = {
            "stop": ["--judge-failure", "stop"],
            "skip": ["--judge-failure", "skip", "--judge-missing-window", "2"],
        }
        base += "--train-iters 50 --judge-concurrency 4".split()
        commands = []
        for name, url in servers.items():
            files = ["--metrics-file", f"{root}/{name}.jsonl", "--save", f"{root}/{name}"]
            commands.append(Command(name, [*base, *flags[name], *files, "--judge-url", url], str(root / "data")))
        found = run_commands(commands, 2, root / "cases")
    return {name: (found[name], root / f"{name}.jsonl", url) for name, url in servers.items()}


def test_stop_ends_the_run_at_once_and_names_the_server(outcomes: dict[str, tuple[list[Outcome], Path, str]]) -> None:
    ranks, metrics, url = outcomes["stop"]
    assert [rank.status for rank in ranks] == [2, 2], ranks[0].stdout + ranks[0].stderr
    said = ranks[0].stderr + ranks[1].stderr
    assert said.count("megatron_sip: error: ") == 1
    assert f"no server of --judge-url answers ({url}: " in said
    assert "start a server, then start again (a run goes on from its last checkpoint" in said
    assert "paused" not in ranks[0].stdout
    made = lines_of(metrics)
    assert 2 <= len(made) < 50
    assert all(line["judge/missing"] == 0 for line in made), "no step was made of an outage"


def test_skip_ends_the_run_by_the_share_of_missing_verdicts(
    outcomes: dict[str, tuple[list[Outcome], Path, str]],
) -> None:
    ranks, metrics, url = outcomes["skip"]
    assert [rank.status for rank in ranks] == [2, 2], ranks[0].stdout + ranks[0].stderr
    said = ranks[0].stderr + ranks[1].stderr
    assert "answers of the quality service are missing over the last 2 steps, most often connection" in said
    assert url in said
    assert "--judge-max-missing-share 0.5" in said
    assert lines_of(metrics)[-1]["judge/missing"] > 0
