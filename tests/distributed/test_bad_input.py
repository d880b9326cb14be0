"""Each bad input ends at once, on all ranks, with one message, and leaves what was saved intact."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
from commands import Command, Outcome, run_commands
from fake_server import FakeServer, status
from spawn import free_port, torchrun
from tiny_corpus import documents, make_corpus, make_tokenizer
from tiny_run import DATA, MODEL, TRAINING

from megatron_sip.checkpoint.lock import LOCK
from megatron_sip.data.indexed import IndexedWriter
from megatron_sip.data.preprocess import preprocess
from megatron_sip.parallel.inquest import Home

RIGHT_KEY, WRONG_KEY = "the-right-key-314", "a-wrong-key-271"
PREFIX = "megatron_sip: error: "
LONGEST_SECONDS = 60.0
"""Generous for two busy cores; a rank that waits for another one would take the time-out of a collective."""


@dataclass(frozen=True)
class Bad:
    """Flags behind those of a good run, and what the message must hold."""

    flags: tuple[str, ...]
    says: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)


def judged(url: str, *flags: str) -> tuple[str, ...]:
    """Flags of a run with a served judge."""
    return ("--quality-weight", "1", "--judge-reading", "logit", "--judge-url", url, *flags)


def make_inputs(root: Path, good: str) -> None:
    """Damaged and foreign corpora."""
    for name in ("truncated-idx", "truncated-bin"):
        for end in (".idx", ".bin"):
            shutil.copy(f"{good}{end}", root / f"{name}{end}")
    for path in (root / "truncated-idx.idx", root / "truncated-bin.bin"):
        path.write_bytes(path.read_bytes()[:-100])
    (root / "held").mkdir()
    owner = {"home": asdict(Home.here()), "since": "this morning", "token": "x"}  # this process, which lives
    (root / "held" / LOCK).write_text(json.dumps(owner))
    IndexedWriter(str(root / "empty"), np.dtype(np.uint16)).close()
    with IndexedWriter(str(root / "larger"), np.dtype(np.uint16)) as writer:
        for _ in range(20):
            writer.add([*range(5, 65), 40000, 0])
    other = documents(40, 6, seed=9)
    make_tokenizer(root / "other-tokenizer", other, vocab_size=300)
    (root / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in other))
    preprocess([str(root / "other.jsonl")], str(root / "other"), str(root / "other-tokenizer"))


def bad_inputs(root: Path, guarded: FakeServer, broken: FakeServer) -> dict[str, Bad]:
    """Every bad input by name; each is added to a run that resumes from a checkpoint and would save to it."""
    nobody = f"http://127.0.0.1:{free_port()}/v1"
    key = {"JUDGE_API_KEY": RIGHT_KEY}
    found = {
        "missing-corpus": Bad(("--data-path", f"{root}/nowhere"), ("--data-path", "nowhere.bin does not exist")),
        "empty-corpus": Bad(("--data-path", f"{root}/empty"), ("--data-path", "the corpus is empty")),
        "truncated-idx": Bad(("--data-path", f"{root}/truncated-idx"), ("truncated-idx.idx is truncated",)),
        "truncated-bin": Bad(("--data-path", f"{root}/truncated-bin"), ("truncated-bin.bin is truncated",)),
        "ids-beyond-the-tokenizer": Bad(
            ("--data-path", f"{root}/larger"), ("--data-path", "holds token id 40000", "--tokenizer-model")
        ),
        "corpus-of-another-tokenizer": Bad(
            ("--data-path", f"{root}/other_text_document"), ("--data-path", "another tokenizer than --tokenizer-model")
        ),
        "vocabulary-smaller-than-the-tokenizer": Bad(("--vocab-size", "100"), ("--vocab-size", "--tokenizer-model")),
        "missing-tokenizer": Bad(("--tokenizer-model", f"{root}/nowhere"), ("--tokenizer-model", "cannot be read")),
        "short-documents": Bad(
            ("--min-document-length", "5000"), ("none of 60 documents can be cut", "60", "--min-document-length")
        ),
        "judge-that-refuses": Bad(judged(nobody), ("cannot connect", nobody, "--judge-url")),
        "rewriter-that-refuses": Bad(
            ("--pool", "original", "rewrite", "rollout", "--rewriter-url", nobody), ("cannot connect", "--rewriter-url")
        ),
        "wrong-key": Bad(judged(guarded.url), ("rejects the key", "JUDGE_API_KEY"), {"JUDGE_API_KEY": WRONG_KEY}),
        "no-key": Bad(judged(guarded.url), ("rejects the key", "JUDGE_API_KEY")),
        "unknown-model": Bad(
            judged(guarded.url, "--judge-model", "gpt-9"), ("'gpt-9'", "it serves: fake", "--judge-model"), key
        ),
        "tp-and-heads": Bad(
            ("--num-attention-heads", "3", "--num-query-groups", "3", "--hidden-size", "48"),
            ("--tensor-model-parallel-size 2", "--num-attention-heads 3"),
        ),
        "wider-model": Bad(
            ("--hidden-size", "64"), ("--hidden-size is 64, run_config.yaml says 32", f"{root}/saved/iter_0000002")
        ),
        "fewer-layers": Bad(("--num-layers", "2"), ("--num-layers is 2, run_config.yaml says 4",)),
        # Every tensor keeps its shape here, so only the written flags can tell.
        "other-heads": Bad(
            ("--num-attention-heads", "8", "--num-query-groups", "4"),
            ("--num-attention-heads is 8, run_config.yaml says 4",),
        ),
        "larger-vocabulary": Bad(("--vocab-size", "900"), ("--vocab-size is 900, run_config.yaml says",)),
        "ranks-and-layout": Bad(
            ("--tensor-model-parallel-size", "3"),
            ("2 ranks", "--tensor-model-parallel-size 3", "--pipeline-model-parallel-size 1"),
        ),
        "missing-checkpoint": Bad(("--load", f"{root}/nowhere"), ("--load", "nowhere", "does not exist")),
        "save-in-a-file": Bad(("--save", f"{root}/larger.bin"), ("cannot write to --save", "larger.bin: File exists")),
        "save-of-another-run": Bad(
            ("--save", f"{root}/held"), (f"--save {root}/held is in use by another run", "since this morning")
        ),
        "retention-without-multiple": Bad(
            ("--save-interval", "2", "--save-retain-interval", "3"),
            ("--save-retain-interval 3", "--save-interval 2", "such as 4"),
        ),
        "misspelt-flag": Bad(("--tensor-model-paralel-size", "2"), ("--tensor-model-parallel-size",)),
        "judge-without-verdicts": Bad(
            judged(
                broken.url,
                *("--classifier-weight", "0", "--judge-retries", "0", "--judge-missing-window", "2"),
                # It makes an iteration before it stops, whose reports are not the saved run's.
                *("--train-iters", "5", "--metrics-file", f"{root}/silent.jsonl", "--sample-log", f"{root}/silent.txt"),
                # Audit log and journal lie there.
                *("--save", f"{root}/silent"),
            ),
            (
                "answers of the quality service are missing over the last 2 steps",
                "most often http_status",
                "--judge-url",
            ),
        ),
    }
    assert len(found) == 26
    return found


NAMES = (
    "missing-corpus empty-corpus truncated-idx truncated-bin ids-beyond-the-tokenizer corpus-of-another-tokenizer "
    "vocabulary-smaller-than-the-tokenizer missing-tokenizer short-documents judge-that-refuses rewriter-that-refuses "
    "wrong-key no-key unknown-model tp-and-heads wider-model fewer-layers other-heads larger-vocabulary "
    "ranks-and-layout missing-checkpoint save-in-a-file save-of-another-run retention-without-multiple misspelt-flag "
    "judge-without-verdicts"
).split()


@dataclass(frozen=True)
class Launch:
    """Inputs and outcomes of the one launch."""

    good_flags: list[str]
    bad: dict[str, Bad]
    outcomes: dict[str, list[Outcome]]
    trimming_log: Path


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """A good run that saves; then each bad input on top of its checkpoint; then a judge with a short context."""
    root = tmp_path_factory.mktemp("bad")
    data_path, tokenizer = make_corpus(root / "data")
    make_inputs(root, data_path)
    saved, trimming_log = root / "saved", root / "trimming.jsonl"
    base = [*MODEL, *DATA, *TRAINING, "--data-path", data_path, "--tokenizer-model", tokenizer]
    base += ["--tensor-model-parallel-size", "2", "--save", str(saved)]
    base += ["--distributed-timeout-minutes", "1", "--stage-timeout", "50"]
    base += ["--metrics-file", f"{saved}/metrics.jsonl", "--sample-log", f"{saved}/samples.jsonl"]
    resumed = [*base, "--load", str(saved)]
    with FakeServer(key=RIGHT_KEY) as guarded, FakeServer(max_model_len=205) as short, FakeServer() as broken:
        broken.fault_every_time = status(500)
        bad = bad_inputs(root, guarded, broken)
        commands = [Command("good", [*base, "--train-iters", "2"], str(saved))]
        commands += [Command(name, [*resumed, *item.flags], str(saved), item.environment) for name, item in bad.items()]
        # Its own --save, so that what the bad inputs must leave alone stays alone.
        own = ["--load", str(saved), "--save", str(root / "trimmed"), "--metrics-file", str(trimming_log)]
        flags = [*base, *own, *judged(short.url), "--train-iters", "3"]
        commands.append(Command("short-context", flags, str(saved)))
        yield Launch(resumed, bad, run_commands(commands, 2, root / "cases"), trimming_log)


def check_one_message(stderr: str, says: tuple[str, ...]) -> None:
    """One message of ours, which holds all of `says`."""
    assert stderr.count(PREFIX) == 1, stderr
    message = stderr[stderr.index(PREFIX) :]
    for part in says:
        assert part in message, message


def test_the_names_are_those_of_the_inputs(launch: Launch) -> None:
    assert list(launch.bad) == NAMES


def test_the_good_run_saves(launch: Launch) -> None:
    outcomes = launch.outcomes["good"]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert "latest_checkpointed_iteration.txt" in outcomes[0].watched


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_ends_at_once_with_one_message(launch: Launch, name: str) -> None:
    first, second = launch.outcomes[name]
    assert (first.status, second.status) == (2, 2), first.stdout + first.stderr + second.stderr
    # Every rank meets it, and the first one tells it.
    check_one_message(first.stderr + second.stderr, launch.bad[name].says)
    for outcome in (first, second):
        assert "Traceback" not in outcome.stdout + outcome.stderr
        assert len(outcome.stderr.splitlines()) < 10, outcome.stderr
        assert outcome.seconds < LONGEST_SECONDS
        assert WRONG_KEY not in outcome.stdout + outcome.stderr
    assert first.watched == launch.outcomes["good"][0].watched, "what was saved has changed"


def test_a_prompt_beyond_the_context_is_trimmed_and_counted(launch: Launch) -> None:
    outcomes = launch.outcomes["short-context"]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stdout + outcomes[0].stderr
    (line,) = [json.loads(text) for text in launch.trimming_log.read_text().splitlines()]
    assert line["iteration"] == 3
    assert line["judge/prompts_trimmed"] > 0
    assert line["pairs/valid"] > 0
    trimmed = re.search(r"prompts trimmed: (\d+)", outcomes[0].stdout)
    assert trimmed is not None, "the log line must count them"
    assert int(trimmed[1]) == line["judge/prompts_trimmed"]


def test_the_console_shows_one_message_before_torchrun_speaks(launch: Launch) -> None:
    case = launch.bad["wider-model"]
    result = torchrun(2, "-m", "megatron_sip.pretrain", *launch.good_flags, *case.flags)
    assert result.returncode != 0
    check_one_message(result.stderr, case.says)
    ours = result.stderr.split("torch/distributed/elastic/")[0]
    assert "Traceback" not in ours, ours
    assert len(ours.splitlines()) < 10, ours
