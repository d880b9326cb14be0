"""A run that is killed and started again repeats with the same verdicts, though the server answers anew each time."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from commands import Command, Outcome, run_commands
from fake_server import FakeServer, chat_body, hang, labels_body, respond, status
from test_stopped import started, until
from tiny_corpus import make_corpus
from tiny_run import DATA, MODEL, TRAINING

from megatron_sip.services.prompts import REWRITE_END

CLOCKS = ("time/", "throughput/", "unix_time", "elapsed_ms")
# Nobody is asked for what the journal holds.
OF_ASKING = ("judge/from_journal", "judge/prompts_trimmed")
WORDS = "gentle bread village baker again every whole small gives round always morning".split()


class Fickle:
    """Draws each verdict and each rewrite anew; from the call number `last` on it does not answer."""

    def __init__(self, last: int) -> None:
        self.draw, self.last, self.calls = random.Random(1), last, 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.calls += 1
        if self.calls > self.last:
            return await hang(request)
        if REWRITE_END in body["messages"][0]["content"]:
            return await respond(chat_body(" ".join(self.draw.choices(WORDS, k=14))))(request)
        share = self.draw.random()
        values = (math.log(share), math.log(1 - share))
        names = [f"token_id:{token}" for token in body["logprob_token_ids"]]
        entries = [{"token": name, "logprob": value} for name, value in zip(names, values, strict=True)]
        return await respond(labels_body(entries))(request)


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file without clocks; a line that a kill cut off is left out."""
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(CLOCKS)} for line in whole]


def trained(line: dict[str, Any]) -> dict[str, Any]:
    """What of a line of metrics must repeat bit for bit."""
    return {key: value for key, value in line.items() if key not in OF_ASKING}


class Runs:
    """Command lines of one small run: original, rewrite and two rollouts of each prefix, and two judges."""

    def __init__(self, root: Path) -> None:
        self.root = root
        data_path, tokenizer = make_corpus(root / "data")
        self.base = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer]
        self.base += "--judge-reading logit --quality-weight 1 --judge-retries 0 --save-interval 2".split()
        self.base += "--pool original rewrite rollout --num-rollouts 2".split()

    def flags(self, name: str, url: str, *more: str) -> list[str]:
        """The run in the folder `name`."""
        saved, base = str(self.root / name), self.root / name
        logs = ["--metrics-file", f"{base}.jsonl", "--sample-log", f"{base}-samples.jsonl"]
        return [*self.base, "--judge-url", url, "--load", saved, "--save", saved, *logs, *more]

    def command(self, name: str, folder: str, url: str, *more: str) -> Command:
        """The same for `run_commands`."""
        return Command(name, self.flags(folder, url, *more), str(self.root / "data"))

    def metrics(self, name: str) -> dict[int, dict[str, Any]]:
        """The metrics by iteration."""
        return {line["iteration"]: line for line in lines_of(self.root / f"{name}.jsonl")}

    def samples(self, name: str) -> dict[int, dict[str, Any]]:
        """Every candidate with its scores, by sample."""
        return {line["sample_index"]: line for line in lines_of(self.root / f"{name}-samples.jsonl")}

    def journal(self, name: str) -> list[set[int]]:
        """The samples of each segment."""
        found = []
        for segment in (self.root / name / "journal").iterdir():
            records = [json.loads(line) for line in segment.read_text().splitlines()]
            found.append({record["sample"] for record in records if record["kind"] in ("verdicts", "rewrites")})
        return found

    def copy(self, source: str, target: str) -> None:
        """The same run in another folder."""
        shutil.copytree(self.root / source, self.root / target)
        for log in (f"{source}.jsonl", f"{source}-samples.jsonl"):
            shutil.copyfile(self.root / log, self.root / log.replace(source, target))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("journal"))


@pytest.fixture(scope="module")
def outcomes(runs: Runs) -> dict[str, list[Outcome]]:
    """A run of two leaders that is killed in the judge wait of its fourth step, and what comes after it."""
    # A step asks for 4 rewrites and, of 4 candidates in both orders, for 48 verdicts; rewrites are asked for ahead.
    fickle = Fickle(last=3 * 52 + 4 + 24)
    with FakeServer() as server, FakeServer() as broken:
        server.fault_every_time, broken.fault_every_time = fickle, status(400)
        with started(runs.root / "killed.txt", *runs.flags("killed", server.url)) as run:
            until(lambda: fickle.calls > fickle.last and server.in_flight >= 16, run, "the fourth judge wait")
            for process in psutil.Process(run.pid).children(recursive=True):
                process.kill()
            run.kill()
        runs.copy("killed", "again")
        runs.copy("killed", "layout")
        fickle.last = 10**9
        silent = "--pool original rollout --classifier-weight 0 --judge-missing-window 2".split()
        silent += ["--save-interval", "1"]
        other = "--tensor-model-parallel-size 2 --train-iters 3 --keep-last-n 1".split()
        return run_commands(
            [
                runs.command("again", "again", server.url),
                runs.command("layout", "layout", server.url, *other),
                runs.command("silent", "outage", broken.url, *silent),
                runs.command("mended", "outage", server.url, *silent, "--train-iters", "2"),
            ],
            2,
            runs.root / "cases",
        )


def test_the_steps_since_the_checkpoint_repeat_bit_for_bit(runs: Runs, outcomes: dict[str, list[Outcome]]) -> None:
    assert [rank.status for rank in outcomes["again"]] == [0, 0], outcomes["again"][0].stderr
    killed, again = runs.metrics("killed"), runs.metrics("again")
    assert sorted(killed) == [1, 2, 3]
    assert sorted(again) == [1, 2, 3, 4, 5, 6]
    third = killed[3]
    assert third["judge/asked"] == 4 * (12 + 4)
    assert third["judge/from_journal"] == 0
    assert third["loss"] > 0
    assert third["pairs/valid"] == 4
    assert trained(again[3]) == trained(third)
    # Each score of each candidate, and so the pairs.
    before, after = runs.samples("killed"), runs.samples("again")
    assert {sample: after[sample] for sample in range(8, 12)} == {sample: before[sample] for sample in range(8, 12)}
    assert again[3]["judge/from_journal"] == third["judge/asked"] + 4
    # Of the step that was under way the rewrites had come, and perhaps the verdicts of one of the two leaders.
    assert again[4]["judge/from_journal"] in (4, 4 + 2 * 16)
    assert again[5]["judge/from_journal"] == again[6]["judge/from_journal"] == 0
    held = again[3]["judge/from_journal"] + again[4]["judge/from_journal"]
    said = f"journal: {held - 8:.0f} verdicts and 8 rewrites of the steps since iteration 2\n"
    assert said in outcomes["again"][0].stdout


def test_another_number_of_leaders_finds_all_verdicts(runs: Runs, outcomes: dict[str, list[Outcome]]) -> None:
    assert [rank.status for rank in outcomes["layout"]] == [0, 0], outcomes["layout"][0].stderr
    killed, resharded = runs.metrics("killed")[3], runs.metrics("layout")[3]
    assert resharded["judge/from_journal"] == killed["judge/asked"] + 4
    assert resharded["loss"] == pytest.approx(killed["loss"], rel=1e-4)
    for key in ("pairs/valid", "scores/quality/rollout", "scores/quality/rewrite", "judge/asked"):
        assert resharded[key] == pytest.approx(killed[key], rel=1e-12)


def test_segments_that_no_checkpoint_needs_are_gone(runs: Runs, outcomes: dict[str, list[Outcome]]) -> None:
    """Of all checkpoints the oldest is that of iteration 2, behind sample 7; of the last one alone that of 3."""
    held = runs.journal("again")
    assert set().union(*held) >= set(range(8, 24))
    assert min(max(samples) for samples in held) >= 8
    held = runs.journal("layout")
    assert set().union(*held) >= set(range(12, 16)), "the rewrites of the step that was under way"
    assert min(max(samples) for samples in held) >= 12


def test_a_run_that_no_judge_answered_asks_anew(runs: Runs, outcomes: dict[str, list[Outcome]]) -> None:
    assert [rank.status for rank in outcomes["silent"]] == [2, 2]
    said = "".join(rank.stderr for rank in outcomes["silent"])  # by the first rank that knows
    assert "answers of the quality service are missing over the last 2 steps" in said
    assert [rank.status for rank in outcomes["mended"]] == [0, 0], outcomes["mended"][0].stderr
    assert "journal: 0 verdicts and 0 rewrites of the steps since iteration 1\n" in outcomes["mended"][0].stdout
    second = runs.metrics("outage")[2]
    assert second["judge/missing"] == second["judge/from_journal"] == 0
    assert second["pairs/valid"] == 4
