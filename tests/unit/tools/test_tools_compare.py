"""tools/compare.py, held_out_loss.py and check_server.py by their command lines, against a small server."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_server import FakeServer, die
from tiny_corpus import documents, make_corpus

from megatron_sip.config.judge_set import KINDS
from megatron_sip.errors import ConfigError
from tools import compare, held_out_loss

ROOT = Path(__file__).resolve().parents[3]


def tool(name: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *flags],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small policies, a corpus with its tokenizer, held-out documents and unsafe prefixes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("compare")
    make_corpus(root)
    for seed, name in enumerate(("base", "sip")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
    for name, seed in (("held_out", 7), ("unsafe", 8)):
        lines = (json.dumps({"text": text}) for text in documents(6, 6, seed))
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def flags_of(place: Path, url: str, out: Path) -> list[str]:
    return [
        *("--arm", f"base={place / 'base'}", "--arm", f"sip={place / 'sip'}", "--arm", f"same={place / 'base'}"),
        *("--tokenizer-model", str(place / "tokenizer"), "--held-out", str(place / "held_out.jsonl")),
        *("--unsafe", str(place / "unsafe.jsonl"), "--judge-url", url, "--out", str(out)),
        *("--num-prefixes", "5", "--num-unsafe-prefixes", "4", "--prefix-length", "12", "--suffix-length", "8"),
        *("--trained-with", "judge"),
    ]


def test_the_report_has_every_arm_and_names_shared_weights(place: Path, tmp_path: Path) -> None:
    with FakeServer(models=("small-judge",)) as server:
        done = tool("compare.py", *flags_of(place, server.url, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    arms = report["quality"]["arms"]
    assert list(arms) == ["base", "sip", "same"]
    [(label, rate)] = arms["sip"]["win_rates"].items()
    # The server believes the same whatever is asked, so the two orders cancel.
    assert rate["estimate"]["mean"] == pytest.approx(0.5)
    assert rate["estimate"]["count"] == 5
    assert arms["same"]["win_rates"][label]["identical"] == 5
    assert arms["base"]["texts"]["texts"] == 5
    assert list(report["safety"]["weights"]) == ["profanity-check"]
    assert report["training_weights"] == ["small-judge"]
    assert "another reading of the same weights is not another judge" in done.stdout.replace("\n", " ")
    assert "written to" in done.stdout


def test_several_judges_each_with_its_own_weights(place: Path, tmp_path: Path) -> None:
    with FakeServer(models=("small-judge",)) as server, FakeServer(models=("taste",)) as other:
        more = [f"quality-b.url={other.url}", "quality-b.kind=quality", "quality-b.reading=generate"]
        more += [f"reward.url={other.url}", "reward.weight=1", "likelihood.weight=0"]
        flags = [*flags_of(place, server.url, tmp_path / "out"), "--judge-set", *more]
        done = tool("compare.py", *flags, "--trained-with-model", "third")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    weights = {reader["label"]: reader["weights"] for reader in report["quality"]["readers"]}
    assert weights == {
        "quality (one-token verdicts)": "small-judge",
        "quality-b (written verdicts)": "taste",
        "reward": "taste",
    }
    assert set(report["quality"]["arms"]["sip"]["win_rates"]) == set(weights) - {"reward"}
    assert report["quality"]["arms"]["sip"]["scores"]["reward"]["estimate"]["mean"] == pytest.approx(0.5)
    assert report["training_weights"] == ["small-judge", "third"]
    told = " ".join(report["remarks"])
    assert "quality (one-token verdicts) reads small-judge, which also scored the candidates in training" in told
    assert "quality-b (written verdicts) reads taste, which had no part in the training scores" in told


def parsed(*flags: str) -> argparse.Namespace:
    needed = ["--arm", "a=b", "--tokenizer-model", "t", "--held-out", "h", "--out", "o", "--trained-with", "none"]
    return compare.build_parser().parse_args([*needed, "--judge-url", "http://127.0.0.1:9/v1", *flags])


def test_every_vote_of_a_judge_is_asked() -> None:
    config = compare.judge_config(parsed("--judge-set", "safety.weight=1", "safety.reading=generate", "safety.votes=5"))
    readers = {reader.judge: reader for reader in compare.readers_of(config, dict.fromkeys(KINDS, "model"))}
    assert {name: reader.votes for name, reader in readers.items()} == {"quality": 1, "safety": 5, "likelihood": 1}
    assert readers["safety"].label == "safety (written verdicts, 5 votes)"


def test_votes_that_would_all_be_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--judge-set safety\.votes 5 has no meaning with --judge-reading logit"):
        compare.judge_config(parsed("--judge-set", "safety.weight=1", "safety.votes=5"))


def test_failed_verdicts_are_missing_and_counted(place: Path, tmp_path: Path) -> None:
    # Labels without probability mass: every verdict is asked and none can be read.
    with FakeServer(models=("small-judge",), label_logprobs=(-30.0, -31.0)) as server:
        done = tool("compare.py", *flags_of(place, server.url, tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    [rate] = report["quality"]["arms"]["sip"]["win_rates"].values()
    assert rate["unanswered"] == 5
    assert rate["missing"] == {"low_label_mass": 10}
    assert rate["estimate"] is None
    assert "missing verdicts" in done.stdout


def test_a_server_that_refuses_ends_the_comparison_with_one_line(place: Path, tmp_path: Path) -> None:
    with FakeServer(key="right") as server:
        done = tool("compare.py", *flags_of(place, server.url, tmp_path / "out"), JUDGE_API_KEY="wrong-key")
    assert done.returncode == 1
    assert "JUDGE_API_KEY" in done.stderr
    assert "wrong-key" not in done.stderr + done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(60)
def test_a_server_that_goes_away_ends_the_comparison(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeServer() as server:
        server.script.append(die(server))
        assert compare.main(flags_of(place, server.url, tmp_path / "out")) == 1
    assert "compare: no server of --judge-url answers" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--judge-concurrency", "--num-prefixes", "--judge-timeout"])
def test_numbers_that_nothing_can_be_done_with_are_refused_by_their_flag(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    needed = [("--arm", "a=b"), ("--tokenizer-model", "t"), ("--held-out", "h"), ("--judge-url", "u"), ("--out", "o")]
    with pytest.raises(SystemExit):
        compare.main([word for pair in needed for word in pair] + ["--trained-with", "none", flag, "0"])
    assert f"argument {flag}: 0 is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--classifiers-dir", "/nowhere"], "--classifiers-dir /nowhere"),
        (["--out", "/proc/none/report"], "/proc/none"),
    ],
)
def test_what_is_missing_at_the_end_is_told_at_the_beginning(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    with FakeServer() as server:
        assert compare.main([*flags_of(place, server.url, tmp_path / "out"), *flags]) == 1
        assert server.requests == [], "nobody was judged for nothing"
    assert message in capsys.readouterr().err


def test_held_out_loss_prints_both_and_refuses_an_untrained_policy(place: Path, tmp_path: Path) -> None:
    corpus = str(place / "corpus_text_document")
    done = tool(
        "held_out_loss.py",
        *("--model", str(place / "base"), "--train-path", corpus, "--data-path", corpus),
        *("--tokenizer-model", str(place / "tokenizer"), "--seq-length", "32", "--max-tokens", "2000"),
        *("--out", str(tmp_path / "loss.json"), "--require-below-unigram"),
    )
    losses = json.loads((tmp_path / "loss.json").read_text())
    assert done.returncode == 1
    assert "no better than the unigram model" in done.stderr
    assert re.search(r"policy 5\.\d+, unigram [34]\.\d+", done.stdout)
    assert losses["policy"] == pytest.approx(5.77, abs=0.05)  # log 320: it knows nothing
    assert losses["tokens"] % 31 == 0


def test_a_file_that_cannot_be_written_takes_no_number_with_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = str(place / "corpus_text_document")
    flags = ["--model", str(place / "base"), "--train-path", corpus, "--data-path", corpus, "--max-tokens", "400"]
    flags += ["--tokenizer-model", str(place / "tokenizer"), "--seq-length", "32", "--out", "/proc/none/loss.json"]
    assert held_out_loss.main(flags) == 1
    said = capsys.readouterr()
    assert "held-out loss on" in said.out
    assert "held_out_loss: cannot write /proc/none/loss.json" in said.err


def test_check_server_names_the_model_or_the_cause() -> None:
    with FakeServer(models=("small-judge",)) as server:
        good = tool("check_server.py", "--judge-url", server.url)
        other = tool("check_server.py", "--judge-url", server.url, "--judge-model", "big-judge")
    gone = tool("check_server.py", "--judge-url", server.url)
    assert good.returncode == 0
    assert "serves small-judge" in good.stdout
    assert other.returncode == 1
    assert "small-judge" in other.stderr
    assert gone.returncode == 1
    assert "cannot connect" in gone.stderr
